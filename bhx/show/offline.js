// The explorer without Python: who is selected gives the cortex, the bars and the card.
// `Explorer` in explorer.py computes the same; tests compare the two.

const data = JSON.parse(document.getElementById('explorer').textContent)
const [people, brain, strip, labels, slices] = [0, 1, 2, 3, 4].map((i) => document.getElementById(`figure${i}`))
const card = document.getElementById('card')
const bytes = (text) => Uint8Array.from(atob(text), (c) => c.charCodeAt(0)).buffer
const maps = data.maps // of each: person (or one for all), token (or their mean), parcel or cube
for (const map of Object.values(maps)) map.values = new Float32Array(bytes(map.values))
let [onCortex, onCubes] = [false, true].map((cubes) => Object.keys(maps).find((name) => maps[name].cubes === cubes))
const gray = data.volume && new Uint8Array(bytes(data.volume.gray)) // x, y, z
const shares = new Float32Array(bytes(data.shares)) // person, token, modality
const traces = (parcels) =>
  brain.data.flatMap((t, i) => (t.name in parcels ? [[i, new Uint16Array(bytes(parcels[t.name]))]] : []))
const [surfaces, dots] = [traces(data.parcels), traces(data.dots)] // on the cortex and off it
const colors = (shown, map) => shown.map(([, parcel]) => Array.from(parcel, (p) => map[p]))
const everyone = data.subjects.map((_, i) => i)
const past = []
let chosen = everyone
let groups = {} // A and B, as far as they are set
let token = null

// mean over people of what lies behind one another for each of them, or A's mean minus B's
function average(values, size, counts) {
  if (values.length === size && everyone.length > 1) return values.map((v) => (compared() ? 0 : v)) // one for all
  if (!compared()) return mean(values, size, chosen.filter(counts))
  const [a, b] = ['A', 'B'].map((name) => mean(values, size, groups[name].filter(counts)))
  return a.map((v, i) => v - b[i])
}

const compared = () => 'A' in groups && 'B' in groups

function mean(values, size, who) {
  const sum = new Float64Array(size)
  for (const i of who) for (let j = 0; j < size; j++) sum[j] += values[i * size + j]
  return sum.map((v) => v / Math.max(who.length, 1))
}

// a map of each parcel or cube, of a token or of all together
function mapOf(name) {
  const { values, layers, has } = maps[name]
  const places = values.length / maps[name].people / layers
  const each = average(values, layers * places, (i) => has[i])
  if (token !== null && layers > 1) return each.slice(token * places, (token + 1) * places)
  const out = new Float64Array(places)
  each.forEach((v, i) => (out[i % places] += v / layers))
  return out
}

function quantile(sorted, share) {
  const at = share * (sorted.length - 1)
  const [low, high] = [sorted[Math.floor(at)], sorted[Math.ceil(at)]]
  return low + (high - low) * (at % 1)
}

function summary(values) {
  const plain = (v) => (typeof v === 'number' ? +v.toPrecision(4) : v)
  const names = [...new Set(values.map((v) => String(plain(v))))].sort()
  if (names.length > 1 && values.every((v) => typeof v === 'number' || v === null)) {
    const known = values.filter((v) => v !== null)
    return `${+Math.min(...known).toPrecision(3)} to ${+Math.max(...known).toPrecision(3)}`
  }
  return names.slice(0, 5).join(', ') + (names.length > 5 ? ` and ${names.length - 5} more` : '')
}

let waiting = false // for the next frame

// where the colors of a map end, and which they are
function scaleOf(map) {
  const sorted = map.slice().sort()
  const [low, high] = [quantile(sorted, data.beyond), quantile(sorted, 1 - data.beyond)]
  const signed = low < 0 && high > 0
  const most = Math.max(-low, high)
  return { ends: signed ? [-most, most] : [low, high > low ? high : low + 1], colors: data.scales[signed ? 'signed' : 'plain'] }
}

// the map and the card at once, then the other figures
function update() {
  const map = mapOf(onCortex)
  const { ends, colors: colorscale } = scaleOf(map)
  const { what, units, layers } = maps[onCortex]
  const title = `${what} of ${token === null || layers === 1 ? 'all tokens' : `token ${data.tokens[token]}`}${compared() ? ', A minus B' : ''}`
  const scale = { 'coloraxis.colorscale': colorscale, 'coloraxis.colorbar.title.text': units }
  Plotly.update(
    brain,
    { intensity: colors(surfaces, map) },
    { 'coloraxis.cmin': ends[0], 'coloraxis.cmax': ends[1], 'title.text': title, ...scale },
    surfaces.map(([i]) => i),
  )
  if (dots.length) Plotly.restyle(brain, { 'marker.color': colors(dots, map) }, dots.map(([i]) => i))
  drawCard(title)
  window.explorer = { map: Array.from(map), chosen, token, groups, ends } // what is seen, for tests
  if (waiting) return
  waiting = true
  requestAnimationFrame(() =>
    setTimeout(() => {
      waiting = false
      for (const draw of [drawPeople, drawTokens, drawLabels, drawCubes]) draw()
    }),
  )
}

const shown = () => (compared() ? ['A', 'B'].map((name) => groups[name]) : [chosen])

function drawCard(title) {
  const columns = shown()
  const rows = [['subjects', ...columns.map((who) => (who.length === 1 ? data.subjects[who[0]] : `${who.length} of ${everyone.length}`))]]
  if (compared()) rows.unshift(['', 'A', 'B'])
  for (const [name, values] of Object.entries(data.labels)) {
    rows.push([name, ...columns.map((who) => summary(who.map((i) => values[i])))])
  }
  card.replaceChildren(
    ...rows.map((row) => {
      const line = document.createElement('tr')
      for (const text of row) line.insertCell().textContent = text
      return line
    }),
  )
  document.getElementById('said').textContent = `${title}, ${rows[0][1] === 'A' ? rows[1].slice(1).join(' and ') : rows[0][1]}`
}

function drawTokens() {
  const band = { type: 'rect', x0: data.tokens[token] - 0.5, x1: data.tokens[token] + 0.5, y0: 0, y1: 1 }
  const share = average(shares, data.tokens.length * data.modalities, () => true)
  const bars = Array.from({ length: data.modalities }, (_, m) =>
    Array.from(data.tokens, (_, t) => share[t * data.modalities + m]),
  )
  const shapes = token === null ? [] : [{ ...band, yref: 'paper', fillcolor: '#7a7a7a', opacity: 0.4, line: { width: 0 } }]
  const range = compared() ? null : [0, 1]
  Plotly.update(strip, { y: bars }, { shapes, 'yaxis.range': range, 'yaxis.autorange': !range }, bars.map((_, m) => m))
}

// the plane of a volume (x, y, z) at so many mm, as rows upwards of values across
function plane(volume, mm, [across, up, through], stop) {
  const stride = { x: mm.y.length * mm.z.length, y: mm.z.length, z: 1 }
  const far = mm[through].map((v) => Math.abs(v - stop))
  const start = far.indexOf(Math.min(...far)) * stride[through]
  return mm[up].map((_, u) => mm[across].map((_, a) => volume[start + u * stride[up] + a * stride[across]]))
}

const cut = (volume, mm) => data.volume.planes.map((axes) => plane(volume, mm, axes, +document.getElementById(`at-${axes[2]}`).value))
const layer = (cubes) => slices.data.flatMap((trace, i) => (trace.name.endsWith(' map') === cubes ? [i] : []))

function drawGray() {
  const hover = data.volume.planes.map(([across, up, through]) =>
    `${across} %{x:.0f}, ${up} %{y:.0f}, ${through} ${document.getElementById(`at-${through}`).value} mm`)
  Plotly.restyle(slices, { z: cut(gray, data.volume.mm), hovertemplate: hover.map((text) => `${text}<extra></extra>`) }, layer(false))
  const units = `<br>%{z:.3g} ${maps[onCubes].units}<extra></extra>`
  Plotly.restyle(slices, { hovertemplate: hover.map((text) => text + units) }, layer(true))
}

// the map of the cubes over the T1: 0 is clear, the extremes cover most of it
function drawCubes() {
  if (!data.volume) return
  const map = mapOf(onCubes)
  const { ends, colors } = scaleOf(map)
  const most = Math.max(...ends.map(Math.abs))
  const faded = colors.map(([at, rgb]) => {
    const cover = (0.8 * Math.abs(ends[0] + at * (ends[1] - ends[0]))) / most
    return [at, rgb.replace('rgb(', 'rgba(').replace(')', `,${cover.toFixed(3)})`)]
  })
  const scale = { 'coloraxis.cmin': ends[0], 'coloraxis.cmax': ends[1], 'coloraxis.colorscale': faded }
  Plotly.update(slices, { z: cut(map, data.volume.cubes) }, scale, layer(true))
  window.explorer.cubes = Array.from(map)
}

// what share of the selected, or of each group, is in each bar of each label
function drawLabels() {
  const columns = shown()
  const [y, customdata, visible, color] = [[], [], [], []]
  for (const [names, at] of Object.values(data.bars)) {
    for (const [i, group] of ['A', 'B'].entries()) {
      const who = columns[i] ?? []
      const counts = names.map((_, bar) => who.filter((person) => at[person] === bar).length)
      customdata.push(counts)
      y.push(counts.map((n) => (100 * n) / Math.max(who.length, 1)))
      visible.push(i < columns.length)
      color.push(compared() ? data.groups[group] : '#7a7a7a')
    }
  }
  if (y.length) Plotly.restyle(labels, { y, customdata, visible, 'marker.color': color })
}

// of the selected, or of both groups, those in one bar
function filter({ curveNumber, pointIndex }) {
  const at = Object.values(data.bars)[Math.floor(curveNumber / 2)][1]
  const keep = (who) => who.filter((person) => at[person] === pointIndex)
  const kept = shown().map(keep)
  const [A, B] = kept
  if (!kept.every((who) => who.length)) {
    document.getElementById('said').textContent = 'Nobody selected is there: take another bar'
  } else if (!B) change({ chosen: A })
  else change({ groups: { A, B }, chosen: [...A, ...B].sort((a, b) => a - b) })
}

function colorBy(name) {
  const { marker, hover, legend } = data.looks[name]
  const look = Object.entries(marker).map(([key, value]) => [`marker.${key}`, [].concat(value).length > 1 ? [value] : value])
  Plotly.restyle(people, { ...Object.fromEntries(look), customdata: [hover] })
  document.getElementById('legend').innerHTML = legend // made by Python, its names escaped
}

function placeBy(name) {
  const { x, y, axes } = data.points[name]
  Plotly.update(people, { x: [x], y: [y] }, { 'xaxis.title.text': axes[0], 'yaxis.title.text': axes[1], 'xaxis.autorange': true, 'yaxis.autorange': true })
}

function show(name) {
  if (maps[name].cubes) onCubes = name
  else onCortex = name
  update()
}

function drawPeople() {
  const ring = everyone.map((i) => Object.keys(groups).find((name) => groups[name].includes(i)))
  const line = { color: ring.map((name) => data.groups[name] ?? 'rgba(0,0,0,0)'), width: ring.some(Boolean) ? 2.5 : 0 }
  Plotly.restyle(people, { selectedpoints: [chosen.length === everyone.length ? null : chosen], 'marker.line': line })
}

// every change goes through here, so that it can be undone
function change(next) {
  past.push({ chosen, token, groups })
  ;({ chosen, token, groups } = { chosen, token, groups, ...next })
  update()
}

const select = (who) => change({ chosen: who, groups: compared() ? {} : groups })

function setGroup(name) {
  if (compared()) return
  const next = { ...groups, [name]: chosen }
  const both = 'A' in next && 'B' in next
  if (both && next.A.some((i) => next.B.includes(i))) {
    document.getElementById('said').textContent = 'Groups have people in common: select others'
  } else change({ groups: next, chosen: both ? [...next.A, ...next.B].sort((a, b) => a - b) : chosen })
}

function undo() {
  if (!past.length) return
  ;({ chosen, token, groups } = past.pop())
  update()
}

const where = (event) => event.points.map((p) => p.pointIndex).sort((a, b) => a - b)
people.on('plotly_selected', (event) => {
  if (event?.points.length) {
    select(where(event))
    Plotly.relayout(people, { selections: [] }) // the loop goes; its people are drawn with the rest
  }
})
people.on('plotly_click', (event) => select(where(event)))
people.on('plotly_deselect', () => select(everyone))
const single = maps[onCortex].layers > 1
if (single) strip.on('plotly_click', (event) => change({ token: event.points[0].pointIndex }))
labels.on('plotly_click', (event) => filter(event.points[0]))
const color = document.getElementById('color')
const changed = (id, act) => (document.getElementById(id).onchange = (event) => act(event.target.value))
changed('color', colorBy)
changed('map', show)
changed('points', placeBy)
const redraw = () => (drawGray(), drawCubes())
if (data.volume) for (const axis of 'xyz') document.getElementById(`at-${axis}`).oninput = redraw
const click = (id, act) => (document.getElementById(id).onclick = act)
click('reset', () => change({ token: null, chosen: everyone, groups: {} }))
click('undo', undo)
click('groupA', () => setGroup('A'))
click('groupB', () => setGroup('B'))

// by keyboard: the arrows walk through people, or through tokens, Escape takes all
function walk(panel, name, count, at, go) {
  panel.tabIndex = 0
  panel.setAttribute('role', 'application')
  panel.setAttribute('aria-label', name)
  panel.addEventListener('keydown', (event) => {
    const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key]
    const next = at() + step // -1 and less: from all, or from the first, backwards
    if (step) go(next < 0 ? count - 1 : next % count)
    else if (event.key === 'Escape') go(null)
    else return
    event.preventDefault()
  })
}
walk(people, 'People: arrows walk through them, Escape selects all', everyone.length,
  () => (chosen.length === 1 ? chosen[0] : -1), (i) => select(i === null ? everyone : [i]))
if (single) {
  walk(strip, 'Hub tokens: arrows walk through them, Escape takes all together', data.tokens.length,
    () => token ?? -1, (i) => change({ token: i }))
}
labels.setAttribute('role', 'img')
labels.setAttribute('aria-label', 'Histograms of labels of who is selected')
brain.setAttribute('role', 'img')
brain.setAttribute('aria-label', 'Cortex: attention to each parcel')
slices?.setAttribute('role', 'img')
slices?.setAttribute('aria-label', 'T1: attention to each cube, at the sliders')
colorBy(color.value)
update()
if (data.volume) redraw()
