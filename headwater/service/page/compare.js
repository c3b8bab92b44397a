// Two runs side by side: the same head of both, and one chart of both over depth as a share of the model.

import { getJson, runPath } from "/page/api.js";
import { make, problem } from "/page/dom.js";
import { lines } from "/page/draw.js";
import { figure, rowsOf } from "/page/figure.js";
import * as panels from "/page/panels.js";

export async function compareView(main, places, go) {
  const { runs } = await getJson("/runs"), usable = runs.filter((r) => r.complete).map((r) => r.name);
  const chosen = { a: usable.includes(places.a) ? places.a : usable[0], b: usable.includes(places.b) ? places.b : usable[1] ?? usable[0] };
  const at = { s: Number(places.s || 0), l: Number(places.l || 0), h: Number(places.h || 0) };
  const body = make("div", { id: "comparison" });
  const select = (side) => make("select", { id: `run-${side}`, "aria-label": `run ${side}`, onchange: (event) => { chosen[side] = event.target.value; show(); } },
    usable.map((name) => make("option", { selected: name === chosen[side] }, name)));
  const box = (key, label) => make("label", {}, `${label} `, make("input", { type: "number", min: 0, value: at[key], "data-place": key,
    onchange: (event) => { at[key] = Math.max(0, Number(event.target.value) || 0); show(); } }));
  main.replaceChildren(make("h1", {}, "Compare"), make("div", { class: "row" }, select("a"), "and", select("b"), box("s", "sequence"), box("l", "layer"), box("h", "head")), body);
  let turn = 0;
  const show = async () => {
    const mine = ++turn;
    go({ ...chosen, ...at });
    try {
      const sides = await Promise.all(["a", "b"].map((side) => read(chosen[side], at)));
      if (mine === turn) body.replaceChildren(...draw(sides, at));
    } catch (error) {
      if (mine === turn) body.replaceChildren(problem(error));
    }
  };
  if (usable.length) show();
  else body.append(make("p", { class: "soft" }, "there is nothing to compare yet"));
  const keys = { ArrowUp: ["l", -1], k: ["l", -1], ArrowDown: ["l", 1], j: ["l", 1], ArrowLeft: ["h", -1], h: ["h", -1], ArrowRight: ["h", 1], l: ["h", 1], "[": ["s", -1], "]": ["s", 1] };
  return { key: (name) => {
    if (!(name in keys)) return false;
    const [what, by] = keys[name];
    at[what] = Math.max(0, at[what] + by);
    main.querySelector(`[data-place="${what}"]`).value = at[what];
    show();
    return true;
  } };
}

async function read(run, at) {
  const about = await getJson(runPath(run, "about")), sequence = Math.min(at.s, about.n_sequences - 1), found = { run, about, sequence };
  const clamp = (list, value) => (list?.length ? (list.includes(value) ? value : list.at(-1)) : null);
  found.layer = clamp(about.coordinates.layer, at.l);
  found.head = clamp(about.coordinates.head, at.h);
  const get = (kind) => (panels.holds(about, kind) ? panels.getFigure(run, kind, sequence) : null);
  [found.tokens, found.sinks, found.norm, found.massive, found.cosine] = await Promise.all(["tokens", "sinks", "norm", "massive", "cosine"].map(get));
  if (about.sites.includes("pattern")) found.pattern = await panels.getPattern(run, sequence, found.layer, found.head);
  return found;
}

function draw(sides, at) {
  const pairs = [];
  const both = (make_) => {
    const drawn = sides.map(make_);
    if (drawn.some(Boolean)) pairs.push(make("div", { class: "two", style: "margin-bottom:1rem" }, drawn.map((d) => (d ? figure(d) : make("p", { class: "soft card" }, "not in this run")))));
  };
  const chart = (kind, title, yTitle, log, series) => {
    const there = sides.filter((side) => side[kind]);
    if (!there.length) return;
    const drawn = there.flatMap((side, i) => panels.recolour(series(side[kind], `${side.run}: `), i));
    pairs.push(make("div", { style: "margin-bottom:1rem" }, figure({ title, name: `compare-${kind}`, drawing: lines({ series: drawn, xTitle: "depth / n_layer", yTitle, log, width: 1100 }),
      table: () => there.flatMap((side) => rowsOf(side[kind]).map((row, i) => [i ? side.run : "run", ...row])), python: there.map((side) => `# ${side.run}\n${side[kind].python}`).join("\n") })));
  };
  chart("sinks", "first-token share", "share", false, panels.shareSeries);
  chart("norm", "norm of the residual stream", "norm", true, (data, prefix) => panels.normSeries(data, null, prefix));
  both((side) => side.pattern && withRun(side, panels.patternFigure(side.run, side.pattern, side.tokens, { sequence: side.sequence, layer: side.layer, head: side.head, root: true })));
  both((side) => side.sinks && withRun(side, panels.sinkFigure(side.run, side.sinks)));
  both((side) => side.cosine && withRun(side, panels.cosineFigure(side.run, side.cosine)));
  both((side) => side.massive && withRun(side, panels.massiveFigure(side.run, side.massive)));
  return pairs;
}

const withRun = (side, drawn) => ({ ...drawn, title: `${side.run}: ${drawn.title}` });
