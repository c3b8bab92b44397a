// The figures of one sequence of a run, from what the server gives; used by the viewer and by the comparison.

import { getJson, getNpy, runPath, slicePath } from "/page/api.js";
import { lines, LINES, makeScale, matrix, finite } from "/page/draw.js";
import { mean, median, rowsOf } from "/page/figure.js";
import { number, token } from "/page/dom.js";

export const getFigure = (run, kind, sequence, position) =>
  getJson(runPath(run, `figures/${kind}?sequence=${sequence}${position == null ? "" : `&position=${position}`}`));

const NEEDS = { sinks: ["attn_sink", "pattern"], norm: ["resid_norm", "resid"], massive: ["resid", "resid_max"],
  cosine: ["resid", "resid_cosine"], token: ["attn_received", "pattern"] };

// Whether a run holds what a figure needs.
export const holds = (about, kind) => !(kind in NEEDS) || NEEDS[kind].some((site) => about.sites.includes(site));

export const opened = (run) => `import xarray\nrun = xarray.open_zarr("${location.origin}${runPath(run, "").slice(0, -1)}", chunks=None)\n`;

export async function getPattern(run, sequence, layer, head) {
  const path = slicePath(run, "pattern", { layer, head, sequence });
  const { shape, values } = await getNpy(path);
  return { path, size: shape[0], values };
}

export function patternFigure(run, pattern, tokens, { sequence, layer, head, root, position, pick }) {
  const { strings, arrays } = tokens, n = strings.findLastIndex((_, i) => arrays.value.values[i] >= 0) + 1;
  const start = arrays.row_start.values, square = new Float32Array(n * n);
  for (let q = 0; q < n; q++) square.set(pattern.values.subarray(q * pattern.size, q * pattern.size + n), q * n);
  const labels = strings.slice(0, n).map((s, i) => `${token(s)} ${i}`);
  const drawing = matrix({
    values: square, rows: n, columns: n, scale: makeScale({ high: 1, root }), rowNames: labels, columnNames: labels, tokens: true,
    rowTitle: "query", columnTitle: "key", width: 760, pick: (q, k) => pick?.(k),
    mark: position != null && position < n ? [position, position] : null,
    describe: (q, k) => {
      const row = square.subarray(q * n, q * n + q + 1), visible = k >= start[q] && k <= q;
      const entropy = -row.reduce((sum, p) => sum + (p > 0 ? p * Math.log(p) : 0), 0);
      return `query ${q} ${token(strings[q])} → key ${k} ${token(strings[k])}\nvalue ${visible ? number(square[q * n + k]) : "hidden"}\n` +
        `entropy of the row ${number(entropy)} nats\nfirst-token share ${start[q] <= q ? number(row[start[q]]) : "–"}`;
    },
  });
  return {
    title: `pattern of layer ${layer}, head ${head}`, drawing, href: pattern.path, name: `${flat(run)}-pattern-s${sequence}-l${layer}-h${head}`,
    python: `${opened(run)}value = run.pattern.sel(layer=${layer}, head=${head})[${sequence}]`,
  };
}

const STATISTICS = ["attn_sink", "attn_max", "attn_self", "attn_prev", "attn_entropy", "attn_distance"];

export async function statisticsFigures(run, about, { sequence, layer, head }) {
  const held = STATISTICS.filter((site) => about.sites.includes(site)), found = {};
  await Promise.all(held.map(async (site) => {
    found[site] = Array.from((await getNpy(slicePath(run, site, { layer, head, sequence }))).values);
  }));
  const groups = [["shares of each row", ["attn_sink", "attn_max", "attn_self", "attn_prev"], "probability"],
    ["entropy of each row", ["attn_entropy"], "nats"], ["mean distance of each row", ["attn_distance"], "positions"]];
  return groups.filter(([, sites]) => sites.some((s) => found[s])).map(([title, sites, yTitle]) => {
    const there = sites.filter((s) => found[s]), x = found[there[0]].map((_, i) => i);
    return {
      title: `${title}, layer ${layer}, head ${head}`, name: `${flat(run)}-${there[0]}-s${sequence}-l${layer}-h${head}`,
      drawing: lines({ series: there.map((s) => ({ name: s, x, y: found[s] })), xTitle: "query", yTitle, height: 230, width: 760 }),
      table: () => [["query", ...there], ...x.map((i) => [i, ...there.map((s) => found[s][i])])],
      python: `${opened(run)}value = run[${JSON.stringify(there)}].sel(layer=${layer}, head=${head}).isel(sequence=${sequence})`,
    };
  });
}

export function sinkFigure(run, data, { layer, head, pick } = {}) {
  const { layer: layers, head: heads } = data.coordinates, values = data.arrays.value.values.flat();
  return {
    title: data.title, name: `${flat(run)}-${data.arrays.value.dims.join("-")}`, table: () => rowsOf(data), python: data.python,
    drawing: matrix({
      values, rows: layers.length, columns: heads.length, rowNames: layers.map(String), columnNames: heads.map(String),
      scale: makeScale({ high: Math.max(...finite(values), 1e-9) }), rowTitle: "layer", columnTitle: "head", width: 460,
      height: Math.min(420, layers.length * 26), pick: pick && ((i, j) => pick(layers[i], heads[j])),
      mark: layer == null ? null : [layers.indexOf(layer), heads.indexOf(head)],
    }),
  };
}

export function normSeries(data, position, prefix = "") {
  const values = data.arrays.value.values, places = data.coordinates[data.arrays.value.dims[1]];
  const first = values.length ? values[0].findIndex((v) => v != null) : 0, x = data.coordinates.fraction;
  const at = position == null ? -1 : places.indexOf(position);
  return [
    { name: `${prefix}first position`, x, y: values.map((row) => row[first]) },
    { name: `${prefix}median of the others`, x, y: values.map((row) => median(row.filter((_, i) => i !== first))) },
    ...(at > first ? [{ name: `${prefix}position ${position}`, x, y: values.map((row) => row[at]) }] : []),
  ];
}

export const normFigure = (run, data, position) => ({
  title: data.title, name: `${flat(run)}-norm`, table: () => rowsOf(data), python: data.python,
  drawing: lines({ series: normSeries(data, position), xTitle: "depth / n_layer", yTitle: "norm", log: true }),
});

export function massiveSeries(data, prefix = "") {
  const { dims, values } = data.arrays.value, x = data.coordinates.fraction;
  if (dims.length === 1) return [{ name: `${prefix}largest |x|`, x, y: values }];
  return [
    ...data.coordinates.dimension.map((d, i) => ({ name: `${prefix}dimension ${d}`, x, y: values.map((row) => row[i]) })),
    { name: `${prefix}median |x|`, x, y: data.arrays.median.values, colour: "#888888", dash: "4 3" },
  ];
}

export const massiveFigure = (run, data) => ({
  title: data.title, name: `${flat(run)}-massive`, table: () => rowsOf(data), python: data.python,
  drawing: lines({ series: massiveSeries(data), xTitle: "depth / n_layer", yTitle: "largest |x|", log: true }),
});

export function cosineFigure(run, data, which = "value") {
  const common = { title: data.title + (which === "value" ? "" : ", first position left out"), name: `${flat(run)}-cosine-${which}`,
    table: () => rowsOf(data, which), python: data.python };
  if (data.arrays.value.dims.length === 1) {
    const x = data.coordinates.fraction;
    return { ...common, drawing: lines({ series: [{ name: "cosine", x, y: data.arrays.value.values }], xTitle: "depth / n_layer", yTitle: "cosine" }) };
  }
  const labels = data.coordinates.fraction.map((f) => number(Number(f.toFixed(3)))), values = data.arrays[which].values.flat(), n = labels.length;
  return { ...common, drawing: matrix({ values, rows: n, columns: n, rowNames: labels, columnNames: labels, width: 460,
    scale: makeScale({ low: -1, both: true }), rowTitle: "depth / n_layer", columnTitle: "depth / n_layer" }) };
}

export const shareSeries = (data, prefix = "") => [{ name: `${prefix}mean over heads`, x: data.coordinates.fraction, y: data.arrays.value.values.map(mean) },
  { name: `${prefix}strongest head`, x: data.coordinates.fraction, y: data.arrays.value.values.map((row) => Math.max(...finite(row))), dash: "4 3" }];

export const recolour = (series, at) => series.map((s, i) => ({ ...s, colour: LINES[at], dash: ["", "4 3", "1 3", "8 3"][i % 4] }));

export const flat = (run) => run.replaceAll("/", "-");
