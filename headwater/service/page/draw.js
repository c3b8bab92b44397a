// Drawings as SVG that stands alone: matrices with their axes, and lines. Colours come with the drawing.

import { isDark, number, svg, tip, token } from "/page/dom.js";

const LIGHT = [[255, 255, 255], [198, 219, 239], [107, 174, 214], [33, 113, 181], [8, 30, 80]];
const DARK = [[22, 26, 30], [30, 74, 110], [42, 140, 150], [150, 205, 110], [253, 242, 170]];
const BOTH = [[33, 80, 150], [150, 190, 225], [245, 245, 242], [235, 170, 130], [160, 40, 30]];
const BOTH_DARK = [[110, 175, 240], [50, 95, 145], [34, 38, 42], [150, 75, 45], [245, 150, 110]];
export const LINES = ["#2f7ec4", "#d9822b", "#3f9b54", "#a661b8", "#c94f4f", "#7d8a28", "#4aa3a8"];
const FONT = "font-family:system-ui,'DejaVu Sans',sans-serif";

export function colour(x, both = false) {
  if (!(x >= 0)) return isDark() ? [50, 40, 40] : [236, 232, 228];
  const stops = both ? (isDark() ? BOTH_DARK : BOTH) : isDark() ? DARK : LIGHT;
  const at = Math.min(x, 1) * (stops.length - 1), low = Math.min(Math.floor(at), stops.length - 2);
  return stops[low].map((c, i) => Math.round(c + (stops[low + 1][i] - c) * (at - low)));
}

export function paint(values, rows, columns, scale) {
  const canvas = document.createElement("canvas");
  canvas.width = columns;
  canvas.height = rows;
  const context = canvas.getContext("2d"), image = context.createImageData(columns, rows);
  const table = Array.from({ length: 257 }, (_, i) => colour(i / 256, scale.both)), none = colour(NaN);
  for (let i = 0; i < rows * columns; i++) {
    const x = scale.of(values[i]), c = x >= 0 ? table[Math.min(Math.round(x * 256), 256)] : none;
    image.data.set([c[0], c[1], c[2], 255], 4 * i);
  }
  context.putImageData(image, 0, 0);
  return canvas;
}

export function makeScale({ low = 0, high = 1, root = false, both = false }) {
  const of = (v) => {
    if (v == null || Number.isNaN(v)) return NaN;
    const x = Math.max(0, Math.min(1, (v - low) / (high - low || 1)));
    return root ? Math.sqrt(x) : x;
  };
  return { of, low, high, root, both };
}

export const finite = (values) => Array.from(values).filter((v) => v != null && Number.isFinite(v));

function text(x, y, content, more = {}) {
  return svg("text", { x, y, fill: "currentColor", "font-size": 11, ...more }, content);
}

function frame(width, height) {
  const back = isDark() ? "#1b1f23" : "#ffffff", ink = isDark() ? "#e4e7ea" : "#1b1f24";
  return svg("svg", { xmlns: "http://www.w3.org/2000/svg", viewBox: `0 0 ${width} ${height}`, width, height,
    style: `color:${ink};background:${back};${FONT}` });
}

// A matrix: values row by row, names of rows and columns, `square` cells or a given size. `pick` is told of clicks.
export function matrix({ values, rows, columns, scale, rowNames, columnNames, rowTitle, columnTitle, width = 620, height,
  describe, pick, mark, tokens = false }) {
  const left = tokens ? 92 : 54, top = tokens ? 84 : 34, right = 62, w = width - left - right;
  const h = height || Math.max((w * rows) / columns, 60), cellW = w / columns, cellH = h / rows;
  const root = frame(width, top + h + 12);
  root.append(svg("image", { x: left, y: top, width: w, height: h, preserveAspectRatio: "none", class: "cells",
    style: "image-rendering:pixelated", href: paint(values, rows, columns, scale).toDataURL() }));
  root.append(svg("rect", { x: left, y: top, width: w, height: h, fill: "none", stroke: "currentColor", "stroke-opacity": .35 }));
  const every = (cell, least) => Math.max(1, Math.ceil(least / cell)), cut = (s) => (s.length > 12 ? `${s.slice(0, 11)}…` : s);
  for (let i = 0; i < rows; i += every(cellH, 11)) {
    root.append(text(left - 5, top + (i + .5) * cellH + 4, cut(rowNames[i]), { "text-anchor": "end", "font-size": 10 }));
  }
  for (let j = 0; j < columns; j += every(cellW, tokens ? 11 : 22)) {
    const x = left + (j + .5) * cellW, turned = tokens ? { transform: `rotate(-90 ${x + 3} ${top - 5})`, x: x + 3 } : { x, "text-anchor": "middle" };
    root.append(text(x, top - 5, cut(columnNames[j]), { "font-size": 10, ...turned }));
  }
  root.append(text(left + w / 2, 12, columnTitle, { "text-anchor": "middle", "fill-opacity": .7 }));
  root.append(text(12, top + h / 2, rowTitle, { "text-anchor": "middle", "fill-opacity": .7, transform: `rotate(-90 12 ${top + h / 2})` }));
  bar(root, width - right + 12, top, Math.min(h, 180), scale);
  if (mark) {
    root.append(svg("rect", { x: left + mark[1] * cellW, y: top + mark[0] * cellH, width: cellW, height: cellH, fill: "none",
      stroke: "#e0912f", "stroke-width": 2 }));
  }
  const place = (event) => {
    const box = root.getBoundingClientRect(), x = ((event.clientX - box.left) / box.width) * width - left;
    const y = ((event.clientY - box.top) / box.height) * (top + h + 12) - top;
    const i = Math.floor(y / cellH), j = Math.floor(x / cellW);
    return i >= 0 && j >= 0 && i < rows && j < columns ? [i, j] : null;
  };
  root.addEventListener("mousemove", (event) => {
    const at = place(event);
    tip(event, at && (describe ? describe(...at) : `${rowTitle} ${rowNames[at[0]]}, ${columnTitle} ${columnNames[at[1]]}\n${number(values[at[0] * columns + at[1]])}`));
  });
  root.addEventListener("mouseleave", (event) => tip(event, ""));
  if (pick) {
    root.style.cursor = "pointer";
    root.addEventListener("click", (event) => { const at = place(event); if (at) pick(...at); });
  }
  root.plot = { left, top, cellW, cellH, width, height: top + h + 12 };
  return root;
}

function bar(root, x, y, height, scale) {
  const shades = Float32Array.from({ length: 64 }, (_, i) => 1 - i / 63);
  root.append(svg("image", { x, y, width: 10, height, preserveAspectRatio: "none",
    href: paint(shades, 64, 1, { of: (v) => v, both: scale.both }).toDataURL() }));
  for (const share of [0, .5, 1]) {
    const value = scale.low + (scale.high - scale.low) * (scale.root ? share * share : share);
    root.append(text(x + 14, y + height * (1 - share) + (share === 1 ? 8 : share === 0 ? 0 : 4), number(Number(value.toPrecision(3))), { "font-size": 10 }));
  }
}

// Lines: series with name, x, y and optional colour and dash.
export function lines({ series, xTitle, yTitle, log = false, width = 480, height = 320, xNames }) {
  const entries = placed(series.map((s) => s.name), 62, width), legend = entries.at(-1)?.y || 0;
  const left = 62, top = 14 + legend, right = 14, bottom = 40, w = width - left - right, h = height - top - bottom;
  const usable = (v) => v != null && Number.isFinite(v) && (!log || v > 0), root = frame(width, height);
  const xs = series.flatMap((s) => finite(s.x)), ys = series.flatMap((s) => Array.from(s.y).filter(usable));
  if (!ys.length) return root;
  const scaleY = (v) => (log ? Math.log10(v) : v);
  let [x0, x1] = [Math.min(...xs), Math.max(...xs)], [y0, y1] = [scaleY(Math.min(...ys)), scaleY(Math.max(...ys))];
  if (!log && y0 > 0 && y0 < y1 / 2) y0 = 0;
  if (y0 === y1) [y0, y1] = [y0 - .5, y1 + .5];
  if (x0 === x1) [x0, x1] = [x0 - .5, x1 + .5];
  const px = (x) => left + ((x - x0) / (x1 - x0)) * w, py = (y) => top + h - ((scaleY(y) - y0) / (y1 - y0)) * h;
  for (const v of ticks(y0, y1, log)) {
    const y = py(v);
    root.append(svg("line", { x1: left, x2: left + w, y1: y, y2: y, stroke: "currentColor", "stroke-opacity": .13 }));
    root.append(text(left - 6, y + 4, number(v), { "text-anchor": "end", "font-size": 10 }));
  }
  for (const v of ticks(x0, x1, false)) root.append(text(px(v), top + h + 14, number(v), { "text-anchor": "middle", "font-size": 10 }));
  root.append(text(left + w / 2, height - 8, xTitle, { "text-anchor": "middle", "fill-opacity": .7 }));
  root.append(text(12, top + h / 2, yTitle, { "text-anchor": "middle", "fill-opacity": .7, transform: `rotate(-90 12 ${top + h / 2})` }));
  series.forEach((s, i) => {
    const stroke = s.colour || LINES[i % LINES.length];
    let path = "", pen = "M";
    s.y.forEach((y, j) => {
      if (!usable(y)) { pen = "M"; return; }
      path += `${pen}${px(s.x[j]).toFixed(2)} ${py(y).toFixed(2)}`;
      pen = "L";
    });
    root.append(svg("path", { d: path, fill: "none", stroke, "stroke-width": 1.8, "stroke-dasharray": s.dash }));
    if (s.y.length <= 64) {
      s.y.forEach((y, j) => usable(y) && root.append(svg("circle", { cx: px(s.x[j]), cy: py(y), r: 2.4, fill: stroke })));
    }
    const { x, y } = entries[i];
    root.append(svg("line", { x1: x, x2: x + 16, y1: y, y2: y, stroke, "stroke-width": 2, "stroke-dasharray": s.dash }));
    root.append(text(x + 21, y + 4, s.name));
  });
  root.addEventListener("mousemove", (event) => {
    const box = root.getBoundingClientRect(), x = x0 + (((event.clientX - box.left) / box.width) * width - left) / w * (x1 - x0);
    const at = (s) => s.x.reduce((best, v, j) => (Math.abs(v - x) < Math.abs(s.x[best] - x) ? j : best), 0);
    const first = at(series[0]);
    tip(event, [`${xTitle} ${xNames ? xNames[first] : number(series[0].x[first])}`,
      ...series.map((s) => `${s.name}: ${number(s.y[at(s)])}`)].join("\n"));
  });
  root.addEventListener("mouseleave", (event) => tip(event, ""));
  return root;
}

// Places of the legend's entries, line by line.
function placed(labels, left, width) {
  let x = left, y = 10;
  return labels.map((label) => {
    const w = 36 + 6.3 * label.length;
    if (x > left && x + w > width) [x, y] = [left, y + 14];
    const place = { x, y };
    x += w;
    return place;
  });
}

function ticks(low, high, log) {
  if (log) {
    const found = [], digits = high - low > 3 ? [1] : high - low > .7 ? [1, 2, 5] : [1, 1.5, 2, 3, 4, 5, 6, 7, 8, 9];
    for (let e = Math.floor(low); e <= high; e++) {
      for (const d of digits) if (Math.log10(d) + e >= low - 1e-9 && Math.log10(d) + e <= high + 1e-9) found.push(Number((d * 10 ** e).toPrecision(3)));
    }
    return found;
  }
  const step = 10 ** Math.floor(Math.log10((high - low) / 4 || 1)), wide = [1, 2, 5, 10].find((m) => (high - low) / (m * step) <= 6) * step;
  const found = [];
  for (let v = Math.ceil(low / wide - 1e-9) * wide; v <= high + 1e-9 * wide; v += wide) found.push(Number(v.toPrecision(12)));
  return found;
}

export const names = (strings) => strings.map((s, i) => `${token(s)} ${i}`);
