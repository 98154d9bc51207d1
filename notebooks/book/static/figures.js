// Draws each stored figure when it comes into view, in the colors of the page's theme.
// Greys are turned around for the dark theme, hues are kept; meshes keep every color.

const PAGE = (255 - 18) / 255 // white becomes the dark page's #121212, not black
const KEPT = ['mesh3d', 'surface', 'image']
const dark = () => document.documentElement.dataset.theme === 'dark'

function channels(color) {
  const pen = (channels.pen ??= document.createElement('canvas').getContext('2d', { willReadFrequently: true }))
  pen.fillStyle = '#010203' // what stays when the color is none
  pen.fillStyle = color
  const hex = /^#(..)(..)(..)$/.exec(pen.fillStyle)
  const found = hex
    ? hex.slice(1).map((c) => parseInt(c, 16))
    : pen.fillStyle.match(/[\d.]+/g).map(Number)
  return pen.fillStyle === '#010203' ? null : found
}

function turned(color) {
  const found = channels(color)
  if (!found) return color
  const [r, g, b, alpha = 1] = found
  if (Math.max(r, g, b) - Math.min(r, g, b) > 60) return color
  const level = Math.round(255 - ((r + g + b) / 3) * PAGE)
  return `rgba(${level},${level},${level},${alpha})`
}

function restyled(value, key = '') {
  if (typeof value === 'string') return /color$/.test(key) ? turned(value) : value
  if (!value || typeof value !== 'object' || ArrayBuffer.isView(value)) return value
  if (Array.isArray(value)) {
    return typeof value[0] === 'object' && key !== 'colorscale' ? value.map((v) => restyled(v)) : value
  }
  if (KEPT.includes(value.type) || 'bdata' in value) return value
  return Object.fromEntries(
    Object.entries(value).map(([k, v]) => [k, k === 'colorscale' ? v : restyled(v, k)]),
  )
}

const LIGHT = { layout: { paper_bgcolor: '#ffffff', plot_bgcolor: '#ffffff', font: { color: '#2a3f5f' } } }

function themed(figure) {
  const { width, ...layout } = structuredClone(figure.layout)
  layout.template ??= LIGHT
  const whole = { data: structuredClone(figure.data), layout: { ...layout, autosize: true } }
  return dark() ? restyled(whole) : whole
}

function draw(place) {
  const { data, layout } = themed(place.figure)
  Plotly.react(place.firstElementChild, data, layout, { responsive: true, displaylogo: false })
}

const inView = new IntersectionObserver(
  (entries) => {
    for (const { isIntersecting, target } of entries) {
      if (!isIntersecting) continue
      inView.unobserve(target)
      draw(target)
    }
  },
  { rootMargin: '400px' },
)

for (const place of document.querySelectorAll('.bhx-figure')) {
  place.figure = JSON.parse(place.querySelector('script').textContent)
  place.prepend(document.createElement('div'))
  inView.observe(place)
}

new MutationObserver(() => {
  document.querySelectorAll('.bhx-figure:has(.js-plotly-plot)').forEach(draw)
}).observe(document.documentElement, { attributeFilter: ['data-theme'] })
