// The explorer without Python: who is selected gives the cortex, the bars and the card.
// `Explorer` in explorer.py computes the same; tests compare the two.

const data = JSON.parse(document.getElementById('explorer').textContent)
const [people, brain, strip] = [0, 1, 2].map((i) => document.getElementById(`figure${i}`))
const card = document.getElementById('card')
const bytes = (text) => Uint8Array.from(atob(text), (c) => c.charCodeAt(0)).buffer
const maps = new Float32Array(bytes(data.maps)) // person, token (or one for all), parcel
const shares = new Float32Array(bytes(data.shares)) // person, token, modality
const traces = (parcels) =>
  brain.data.flatMap((t, i) => (t.name in parcels ? [[i, new Uint16Array(bytes(parcels[t.name]))]] : []))
const [surfaces, dots] = [traces(data.parcels), traces(data.dots)] // on the cortex and off it
const colors = (shown, map) => shown.map(([, parcel]) => Array.from(parcel, (p) => map[p]))
const everyone = data.subjects.map((_, i) => i)
let chosen = everyone
let token = null

// mean over people of what lies behind one another for each of them
function mean(values, size, who) {
  const sum = new Float64Array(size)
  for (const i of who) for (let j = 0; j < size; j++) sum[j] += values[i * size + j]
  return sum.map((v) => v / Math.max(who.length, 1))
}

// attention to each parcel, of a token or of all together
function surfaceMap() {
  const each = mean(maps, data.layers * data.parcelCount, chosen.filter((i) => data.has[i]))
  if (token !== null) return each.slice(token * data.parcelCount, (token + 1) * data.parcelCount)
  const out = new Float64Array(data.parcelCount)
  each.forEach((v, i) => (out[i % out.length] += v / data.layers))
  return out
}

function quantile(sorted, share) {
  const at = share * (sorted.length - 1)
  const [low, high] = [sorted[Math.floor(at)], sorted[Math.ceil(at)]]
  return low + (high - low) * (at % 1)
}

function summary(values) {
  const names = [...new Set(values.map(String))].sort()
  if (names.length > 1 && values.every((v) => typeof v === 'number' || v === null)) {
    const known = values.filter((v) => v !== null)
    return `${+Math.min(...known).toPrecision(3)} to ${+Math.max(...known).toPrecision(3)}`
  }
  return names.slice(0, 5).join(', ') + (names.length > 5 ? ` and ${names.length - 5} more` : '')
}

function update() {
  const map = surfaceMap()
  const sorted = map.slice().sort()
  const ends = [quantile(sorted, data.beyond), quantile(sorted, 1 - data.beyond)]
  const title = `Attention of ${token === null ? 'all tokens' : `token ${data.tokens[token]}`}`
  const band = { type: 'rect', x0: data.tokens[token] - 0.5, x1: data.tokens[token] + 0.5, y0: 0, y1: 1 }
  const size = data.tokens.length * data.modalities
  const share = mean(shares, size, chosen)
  const bars = Array.from({ length: data.modalities }, (_, m) =>
    Array.from(data.tokens, (_, t) => share[t * data.modalities + m]),
  )
  Plotly.update(
    brain,
    { intensity: colors(surfaces, map) },
    { 'coloraxis.cmin': ends[0], 'coloraxis.cmax': ends[1], 'title.text': title },
    surfaces.map(([i]) => i),
  )
  if (dots.length) Plotly.restyle(brain, { 'marker.color': colors(dots, map) }, dots.map(([i]) => i))
  const shapes = token === null ? [] : [{ ...band, yref: 'paper', fillcolor: '#7a7a7a', opacity: 0.4, line: { width: 0 } }]
  Plotly.update(strip, { y: bars }, { shapes }, bars.map((_, m) => m))
  mark()
  const rows = [['subjects', chosen.length === 1 ? data.subjects[chosen[0]] : `${chosen.length} of ${everyone.length}`]]
  for (const [name, values] of Object.entries(data.labels)) rows.push([name, summary(chosen.map((i) => values[i]))])
  card.replaceChildren(
    ...rows.map((row) => {
      const line = document.createElement('tr')
      for (const text of row) line.insertCell().textContent = text
      return line
    }),
  )
  window.explorer = { map: Array.from(map), chosen, token, ends } // what is seen, for tests
}

function mark() {
  Plotly.restyle(people, { selectedpoints: [chosen.length === everyone.length ? null : chosen] })
}

function select(who) {
  chosen = who
  update()
}

const where = (event) => event.points.map((p) => p.pointIndex).sort((a, b) => a - b)
people.on('plotly_selected', (event) => {
  if (event?.points.length) {
    select(where(event))
    Plotly.relayout(people, { selections: [] }).then(mark) // the loop goes, its people stay
  }
})
people.on('plotly_click', (event) => select(where(event)))
people.on('plotly_deselect', () => select(everyone))
if (data.layers > 1) {
  strip.on('plotly_click', (event) => {
    token = event.points[0].pointIndex
    update()
  })
}
document.getElementById('reset').onclick = () => {
  token = null
  select(everyone)
}
update()
