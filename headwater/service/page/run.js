// The viewer of one run: patterns or statistics, the sink map, the residual stream, tokens, and where it all comes from.

import { getJson, getNpy, runPath, slicePath } from "/page/api.js";
import { bytes, count, make, number, problem, svg, tip, token } from "/page/dom.js";
import { colour, makeScale, paint } from "/page/draw.js";
import { figure } from "/page/figure.js";
import * as panels from "/page/panels.js";
import { analyseForm, damageOf, progressOf } from "/page/runs.js";

export async function runView(main, name, places, go) {
  const about = await getJson(runPath(name, "about"));
  if (!about.arrays) {
    main.replaceChildren(make("h1", {}, name), make("p", {}, about.error || "The text of this run is being read."));
    return {};
  }
  const view = new RunView(main, name, about, places, go);
  view.draw(); // which goes on while keys are taken already
  return view;
}

class RunView {
  constructor(main, name, about, places, go) {
    Object.assign(this, { main, name, about, go });
    const layers = about.coordinates.layer || [], heads = about.coordinates.head || [];
    const number_ = (value, list, fallback) => (list.includes(Number(value)) && value != null ? Number(value) : fallback);
    this.layers = layers;
    this.heads = heads;
    this.sequence = Math.min(Number(places.s || firstDone(about)), about.n_sequences - 1);
    this.layer = number_(places.l, layers, layers[0]);
    this.head = number_(places.h, heads, heads[0]);
    this.position = places.p == null ? null : Number(places.p);
    this.root = places.scale !== "linear";
    this.hasPattern = about.sites.includes("pattern");
    this.count = 0;
  }

  draw() {
    this.boxes = Object.fromEntries(["grid", "large", "strip", "maps"].map((id) => [id, make("div", { id })]));
    this.progress = make("div", {}, progressOf(this.about));
    this.details = make("div", {}, details(this.name, this.about));
    this.main.replaceChildren(
      make("div", { class: "row" }, make("h1", {}, this.name), damageOf(this.about), this.sequenceInput()),
      make("p", { class: "soft", id: "summary" }, summary(this.about)),
      this.progress, make("section", { class: "card", style: "margin-bottom:1rem" }, this.boxes.strip),
      make("div", { class: "wide" }, make("section", { class: "card" }, this.boxes.grid), this.boxes.large),
      this.boxes.maps, this.details);
    this.show();
  }

  // Show what a job has changed: progress, and results that came.
  async onJob(job) {
    if (job?.run !== this.name || this.loading) return;
    this.loading = true;
    try {
      const before = this.about, ended = job.state !== "running";
      if (!ended) await new Promise((resolve) => setTimeout(resolve, 1000));
      this.about = await getJson(runPath(this.name, "about"));
      this.progress.replaceChildren(...[progressOf(this.about)].filter(Boolean));
      if (ended) this.details.replaceChildren(details(this.name, this.about));
      if (!this.tokens?.complete && before.committed !== this.about.committed) await this.show();
    } finally {
      this.loading = false;
    }
  }

  sequenceInput() {
    const input = make("input", { type: "number", id: "sequence", min: 0, max: this.about.n_sequences - 1, value: this.sequence,
      onchange: () => this.set({ sequence: Math.max(0, Math.min(Number(input.value) || 0, this.about.n_sequences - 1)) }) });
    this.input = input;
    return make("label", {}, "sequence ", input, ` of ${this.about.n_sequences.toLocaleString("en")}`);
  }

  set(changes) {
    const before = this.sequence;
    Object.assign(this, changes);
    this.go({ s: this.sequence, l: this.layer, h: this.head, p: this.position, scale: this.root ? null : "linear" });
    this.input.value = this.sequence;
    return this.show(before === this.sequence ? Object.keys(changes) : null);
  }

  // Draw what changed; all where the sequence did.
  async show(changed = null) {
    const mine = ++this.count, current = () => mine === this.count;
    this.main.setAttribute("aria-busy", true);
    try {
      if (!changed) {
        this.tokens = await panels.getFigure(this.name, "tokens", this.sequence);
        this.figures = {};
        if (!current()) return;
        if (!this.tokens.complete) {
          for (const box of Object.values(this.boxes)) box.replaceChildren();
          this.boxes.strip.replaceChildren(make("p", { class: "warm" }, `Sequence ${this.sequence} is not computed yet.`));
          return;
        }
        this.drawGrid();
      }
      await this.drawLarge(current);
      if (current()) this.drawStrip();
      if (current()) this.markGrid();
      if (current()) await this.drawMaps(current);
    } catch (error) {
      if (current()) this.boxes.large.replaceChildren(problem(error));
    } finally {
      if (current()) this.main.setAttribute("aria-busy", false);
    }
  }

  drawGrid() {
    const { grid } = this.boxes, cells = make("div", { class: "grid", style: `grid-template-columns:2rem repeat(${this.heads.length},minmax(22px,1fr))` });
    cells.append(make("span"), ...this.heads.map((h) => make("span", { class: "label head" }, `${h}`)));
    const watch = new IntersectionObserver((seen) => seen.forEach((entry) => {
      if (entry.isIntersecting) { watch.unobserve(entry.target); this.fillRow(Number(entry.target.dataset.layer)); }
    }), { rootMargin: "100px" });
    for (const layer of this.layers) {
      const label = make("span", { class: "label", "data-layer": layer }, `${layer}`);
      cells.append(label, ...this.heads.map((head) => make("button", { "data-cell": `${layer}.${head}`, title: `layer ${layer}, head ${head}`,
        "aria-label": `layer ${layer}, head ${head}`, onclick: () => this.set({ layer, head }) })));
      watch.observe(label);
    }
    grid.replaceChildren(make("h2", {}, this.hasPattern ? "layer × head" : "layer × head: first-token share by query"), cells);
    this.sequenceOfGrid = this.sequence;
  }

  async fillRow(layer) {
    const sequence = this.sequence;
    const site = this.hasPattern ? null : ["attn_sink", "attn_entropy"].find((s) => this.about.sites.includes(s));
    if (!this.hasPattern && !site) return;
    const path = this.hasPattern ? runPath(this.name, `thumbnails?sequence=${sequence}&layer=${layer}`) : slicePath(this.name, site, { layer, sequence });
    const { shape, values } = await getNpy(path);
    if (sequence !== this.sequence) return;
    const size = shape.slice(1).reduce((a, b) => a * b, 1), scale = makeScale({ high: 1, root: true });
    this.heads.forEach((head, i) => {
      const part = values.subarray(i * size, (i + 1) * size), cell = this.boxes.grid.querySelector(`[data-cell="${layer}.${head}"]`);
      cell?.replaceChildren(this.hasPattern ? paint(part, shape[1], shape[2], scale) : spark(part));
    });
  }

  markGrid() {
    for (const cell of this.boxes.grid.querySelectorAll("[data-cell]")) {
      cell.classList.toggle("here", cell.dataset.cell === `${this.layer}.${this.head}`);
    }
  }

  async drawLarge(current) {
    const { large } = this.boxes, place = { sequence: this.sequence, layer: this.layer, head: this.head };
    if (this.hasPattern) {
      this.pattern = await panels.getPattern(this.name, this.sequence, this.layer, this.head);
      if (!current()) return;
      const drawn = panels.patternFigure(this.name, this.pattern, this.tokens, { ...place, root: this.root, position: this.position,
        pick: (position) => this.set({ position }) });
      const scale = make("button", { onclick: () => this.set({ root: !this.root }), title: "scale of the colours (s)" }, this.root ? "√" : "linear");
      large.replaceChildren(figure({ ...drawn, tools: [scale] }));
    } else if (this.layers.length && this.heads.length) {
      const drawn = await panels.statisticsFigures(this.name, this.about, place);
      if (!current()) return;
      large.replaceChildren(...(drawn.length ? drawn.map(figure) : [make("p", { class: "soft" }, "This run holds no attention.")]));
    } else {
      large.replaceChildren(make("p", { class: "soft card" }, "This run holds no attention: extract one with --preset patterns or statistics."));
    }
  }

  drawStrip() {
    const { strings, arrays } = this.tokens, p = this.position, tints = this.tints();
    const box = make("div", { class: "tokens", id: "tokens", tabindex: 0, role: "group", "aria-label": "tokens" }, strings.map((s, i) => (arrays.value.values[i] < 0 ? null : make("span", {
      "data-position": i, class: i === p ? "here" : null, style: tints[i] ? `background:rgb(var(--tint) / ${Math.min(.85, Math.sqrt(tints[i]))})` : "",
      onclick: () => this.set({ position: i === p ? null : i }),
      onmousemove: (event) => tip(event, `${i} ${token(s)}  id ${arrays.value.values[i]}` + (arrays.loss ? `\nloss ${number(arrays.loss.values[i])} nats` : "") +
        (tints[i] ? `\nattention ${number(tints[i])}` : "")),
      onmouseleave: (event) => tip(event, ""),
    }, s.replaceAll("\n", "⏎\n") || "∅"))));
    const label = p == null ? "click a token to see what attends to it" : this.hasPattern
      ? `tinted: what attends to position ${p}, layer ${this.layer}, head ${this.head}` : `position ${p}`;
    this.boxes.strip.replaceChildren(make("div", { class: "row", style: "margin:0" }, make("h2", {}, "tokens"), make("span", { class: "soft" }, label)), box);
  }

  tints() {
    if (this.position == null || !this.pattern || !this.hasPattern) return [];
    const { size, values } = this.pattern;
    return Array.from({ length: size }, (_, q) => (q >= this.position ? values[q * size + this.position] : 0));
  }

  async figureOf(kind, position) {
    if (!panels.holds(this.about, kind)) return null;
    const key = `${kind} ${position}`;
    if (!(key in this.figures)) {
      this.figures[key] = panels.getFigure(this.name, kind, this.sequence, position);
    }
    return this.figures[key];
  }

  async drawMaps(current) {
    const p = this.position, [sinks, norm, massive, cosine, received] = await Promise.all([this.figureOf("sinks"), this.figureOf("norm"),
      this.figureOf("massive"), this.figureOf("cosine"), p == null ? null : this.figureOf("token", p)]);
    if (!current()) return;
    const at = { layer: this.layer, head: this.head, pick: (layer, head) => this.set({ layer, head }) };
    const drawn = [
      received && { ...panels.sinkFigure(this.name, received, at), name: `${panels.flat(this.name)}-received-${p}` },
      sinks && { ...panels.sinkFigure(this.name, sinks, at), name: `${panels.flat(this.name)}-sinks` },
      norm && panels.normFigure(this.name, norm, p), massive && panels.massiveFigure(this.name, massive),
      cosine && panels.cosineFigure(this.name, cosine), cosine?.arrays.without_first && panels.cosineFigure(this.name, cosine, "without_first"),
    ];
    this.boxes.maps.replaceChildren(make("div", { class: "cards" }, drawn.filter(Boolean).map(figure)));
  }

  key(name) {
    const step = (list, value, by) => list[Math.max(0, Math.min(list.length - 1, list.indexOf(value) + by))];
    const moves = { ArrowUp: ["layer", -1], k: ["layer", -1], ArrowDown: ["layer", 1], j: ["layer", 1], ArrowLeft: ["head", -1], h: ["head", -1],
      ArrowRight: ["head", 1], l: ["head", 1] };
    const n = this.tokens?.arrays.value.values.length || 0;
    if (name in moves) {
      const [what, by] = moves[name], value = step(this[`${what}s`], this[what], by);
      if (value != null) this.set({ [what]: value });
    } else if (name === "[" || name === "]") this.set({ sequence: Math.max(0, Math.min(this.about.n_sequences - 1, this.sequence + (name === "]" ? 1 : -1))) });
    else if (name === "," || name === ".") this.set({ position: Math.max(0, Math.min(n - 1, (this.position ?? -1) + (name === "." ? 1 : -1))) });
    else if (name === "s") this.set({ root: !this.root });
    else return false;
    return true;
  }
}

function firstDone(about) {
  let first = 0;
  for (const [low, high] of about.incomplete) if (first >= low && first < high) first = high;
  return first < about.n_sequences ? first : 0;
}

function spark(values) {
  const n = values.length, top = Math.max(1e-9, ...Array.from(values).filter(Number.isFinite), 1);
  const points = Array.from(values, (v, i) => (Number.isFinite(v) ? `${((i / Math.max(n - 1, 1)) * 40).toFixed(1)},${(39 - (v / top) * 38).toFixed(1)}` : "")).join(" ");
  return svg("svg", { viewBox: "0 0 40 40", class: "spark" }, svg("polyline", { points, fill: "none", stroke: `rgb(${colour(.6)})`, "stroke-width": 1.5 }));
}

const summary = (about) => `${about.model}: ${count(about.n_layer, "layer")}, ${count(about.n_head, "head")}, d_model ${about.d_model} · ` +
  `${count(about.n_sequences, "sequence")} of ${count(about.n_positions, "position")} · ${bytes(about.n_bytes)} · ${about.text.join(", ")}`;

function details(name, about) {
  const url = `${location.origin}${runPath(name, "").slice(0, -1)}`, results = make("div");
  const open = async (analysis) => {
    const found = await getJson(runPath(name, `results/${analysis}`));
    const rows = Object.entries(found.variables).map(([key, v]) => make("tr", {}, make("td", {}, key), make("td", {}, v.dims.join(", ") || "–"),
      make("td", {}, v.values == null ? "large: read it as Zarr" : preview(v.values))));
    results.replaceChildren(make("table", {}, make("tr", {}, make("th", {}, analysis), make("th", {}, "dimensions"), make("th", {}, "values")), rows),
      make("pre", {}, `import xarray\nresult = xarray.open_zarr("${url}.analysis/${analysis}", chunks=None)\n\n${found.attributes.conventions || ""}`));
  };
  return make("section", { class: "card", style: "margin-top:1rem" },
    make("h2", {}, "data"), make("pre", {}, `import xarray\nrun = xarray.open_zarr("${url}", chunks=None)`),
    make("table", {}, make("tr", {}, ["array", "dimensions", "stored as", "bytes", "what"].map((t) => make("th", { class: t === "bytes" ? "n" : null }, t))),
      about.arrays.map((a) => make("tr", {}, make("td", {}, a.name), make("td", {}, Object.entries(a.sizes).map(([d, n]) => `${d} ${n}`).join(", ")),
        make("td", {}, a.dtype + (a.codec === "none" ? "" : ` ${a.codec}`)), make("td", { class: "n" }, bytes(a.n_bytes)), make("td", { class: "soft" }, a.title)))),
    make("h2", { style: "margin-top:1rem" }, "results"),
    make("div", { class: "row" }, about.analyses.map((a) => make("button", { onclick: () => open(a).catch((e) => results.replaceChildren(problem(e))) }, a)), analyseForm(name)),
    results, make("details", {}, make("summary", {}, "provenance"), make("pre", {}, JSON.stringify({ fingerprint: about.fingerprint, made_by: about.made_by,
      sources: about.sources, packing: about.packing, text_digest: about.text_digest, model_digest: about.model_digest, config: about.config }, null, 1))));
}

const preview = (values) => { const flat = [values].flat(Infinity); return flat.slice(0, 6).map((v) => (typeof v === "number" ? number(v) : v ?? "–")).join(", ") + (flat.length > 6 ? ", …" : ""); };
