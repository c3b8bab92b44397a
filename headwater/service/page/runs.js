// The list of runs, and what of a run is shown in several places.

import { getJson, postJson } from "/page/api.js";
import { bytes, count, make, problem } from "/page/dom.js";

export async function runsView(main, jobs) {
  const rows = make("tbody"), search = make("input", { type: "search", id: "search", "aria-label": "search runs", placeholder: "search (/)", oninput: () => fill() });
  let runs = [];
  const fill = () => {
    const wanted = search.value.toLowerCase(), shown = runs.filter((r) => JSON.stringify([r.name, r.model, r.text]).toLowerCase().includes(wanted));
    rows.replaceChildren(...shown.map((run) => row(run, jobs)));
    if (!shown.length) rows.append(make("tr", {}, make("td", { colspan: 7, class: "soft" }, runs.length ? "no run has that" : "no runs yet: submit a job")));
  };
  const load = async () => {
    ({ runs } = await getJson("/runs"));
    fill();
  };
  main.replaceChildren(make("div", { class: "row" }, make("h1", {}, "Runs"), search),
    make("table", { id: "runs" }, make("thead", {}, make("tr", {}, ["run", "model", "text", "size", "sites", "bytes", "state"].map((t) => make("th", { class: t === "bytes" ? "n" : null }, t)))), rows));
  await load();
  return { onJob: soon(load), key: (name) => name === "/" && (search.focus(), true) };
}

// Call a function again at most every second.
function soon(load) {
  let waiting = false;
  return () => {
    if (waiting) return;
    waiting = true;
    setTimeout(() => { waiting = false; load().catch(() => {}); }, 1000);
  };
}

function row(run, jobs) {
  const link = make("a", { href: `#/run/${encodeURIComponent(run.name)}` }, run.name);
  if (!run.n_blocks) return make("tr", {}, make("td", {}, link), make("td", { colspan: 5, class: run.error ? "bad" : "soft" }, run.error || run.state), make("td"));
  const job = [...jobs.values()].find((j) => j.run === run.name && j.kind === "extract" && j.state === "running");
  return make("tr", { "data-run": run.name }, make("td", {}, link), make("td", {}, run.model, make("div", { class: "soft" }, `${run.n_layer} × ${run.n_head}, ${run.d_model}`)),
    make("td", {}, run.text.slice(0, 3).join(", ") + (run.text.length > 3 ? ` and ${run.text.length - 3} more` : "")),
    make("td", {}, `${run.complete.toLocaleString("en")} × ${run.n_positions}`), make("td", { class: "soft" }, run.sites.length > 6 ? count(run.sites.length, "site") : run.sites.join(", ")),
    make("td", { class: "n" }, bytes(run.n_bytes)), make("td", {}, state(run, job), damageOf(run)));
}

function state(run, job) {
  if (run.state === "complete") return make("span", { class: "good" }, "complete");
  const share = make("div", {}, make("progress", { max: run.n_blocks, value: run.committed }), `${run.committed.toLocaleString("en")} of ${count(run.n_blocks, "block")} `);
  if (!job) share.append(goOn(run.name));
  return share;
}

function goOn(name) {
  return make("button", { onclick: async (event) => {
    event.target.disabled = true;
    try {
      await postJson("/jobs", { kind: "extract", document: { out: name } });
    } catch (error) {
      event.target.replaceWith(problem(error));
    }
  } }, "go on");
}

export function damageOf(run) {
  if (!run.damage) return null;
  if (run.damage.error) return make("div", { class: "bad", title: run.damage.error }, "cannot be checked");
  if (!run.damage.n_problems) return make("span", { class: "soft", title: `checked: ${run.damage.checked}` }, " no damage found");
  return make("div", { class: "bad", title: run.damage.problems.map((p) => `${p.path}: ${p.what}`).join("\n") }, count(run.damage.n_problems, "damaged file"));
}

export function progressOf(about) {
  if (about.state === "complete") return null;
  return make("p", {}, make("progress", { max: about.n_blocks, value: about.committed }), `${about.committed} of ${count(about.n_blocks, "block")} `, goOn(about.name));
}

export function analyseForm(name) {
  const said = make("span", { class: "soft" });
  const submit = (kind, document) => async () => {
    try {
      const job = await postJson("/jobs", { kind, document: { run: name, ...document } });
      said.replaceChildren(make("a", { href: "#/jobs" }, `job ${job.id}`), ` reads ${bytes(job.price.read_bytes)}`);
    } catch (error) {
      said.replaceChildren(problem(error));
    }
  };
  return make("span", { class: "row", style: "margin:0" }, make("button", { onclick: submit("analyze", {}) }, "analyse"),
    make("button", { onclick: submit("verify", {}) }, "check every byte"), said);
}
