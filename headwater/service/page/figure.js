// A figure on the page: its drawing, and the ways to take it along: PNG, SVG, the data behind it, the Python that makes it.

import { make, number, save } from "/page/dom.js";

// `drawing` is an SVG element; `table` makes rows of CSV, or `href` is where the data lie; `python` makes them.
export function figure({ title, drawing, name, table, href, python, note, tools = [] }) {
  const code = make("pre", { hidden: true }, python);
  drawing.setAttribute("role", "img");
  drawing.setAttribute("aria-label", title);
  const show = () => {
    code.hidden = !code.hidden;
    if (!code.hidden) navigator.clipboard?.writeText(python).catch(() => {});
  };
  const data = href
    ? make("a", { href, download: `${name}.npy`, title: "the numbers behind it" }, "data")
    : make("button", { onclick: () => save(`${name}.csv`, new Blob([csv(table())], { type: "text/csv" })), title: "the numbers behind it" }, "data");
  return make("section", { class: "card", "data-figure": name },
    make("div", { class: "top" }, make("h2", {}, title), make("span", { class: "tools" }, ...tools,
      make("button", { onclick: () => savePng(name, drawing) }, "PNG"),
      make("button", { onclick: () => save(`${name}.svg`, new Blob([source(drawing)], { type: "image/svg+xml" })) }, "SVG"),
      data, make("button", { onclick: show, title: "the Python that makes it; it is copied, too" }, "Python"))),
    drawing, note ? make("p", { class: "note" }, note) : null, code);
}

const source = (drawing) => new XMLSerializer().serializeToString(drawing);

function savePng(name, drawing) {
  const { width, height } = drawing.viewBox.baseVal, image = new Image();
  image.onload = () => {
    const canvas = make("canvas", { width: 2 * width, height: 2 * height });
    canvas.getContext("2d").drawImage(image, 0, 0, 2 * width, 2 * height);
    canvas.toBlob((blob) => save(`${name}.png`, blob));
  };
  image.src = `data:image/svg+xml;charset=utf-8,${encodeURIComponent(source(drawing))}`;
}

const cell = (value) => (/[",\n]/.test(String(value)) ? `"${String(value).replaceAll('"', '""')}"` : value ?? "");

export const csv = (rows) => rows.map((row) => row.map(cell).join(",")).join("\n") + "\n";

// Rows of a figure's main array: a line for each value, with its coordinates.
export function rowsOf(data, name = "value") {
  const { dims, values } = data.arrays[name], rows = [[...dims, name]];
  const walk = (part, at, i) => {
    if (i === dims.length) rows.push([...at, part]);
    else part.forEach((inner, j) => walk(inner, [...at, data.coordinates[dims[i]]?.[j] ?? j], i + 1));
  };
  walk(values, [], 0);
  return rows;
}

export const median = (values) => {
  const sorted = values.filter((v) => v != null && Number.isFinite(v)).sort((a, b) => a - b);
  return sorted.length ? sorted[Math.floor(sorted.length / 2)] : NaN;
};

export const mean = (values) => {
  const there = values.filter((v) => v != null && Number.isFinite(v));
  return there.length ? there.reduce((a, b) => a + b, 0) / there.length : NaN;
};

export const show = number;
