// Jobs: what waits, runs and has ended, with live progress; and the form that submits one.

import { postJson, putText } from "/page/api.js";
import { bytes, count, make, problem } from "/page/dom.js";

const EXAMPLE = 'model = "demo"\ntext = ["texts/my-text.txt"]\nout = "my-run"\npreset = "patterns"\nseq_len = 128\n';

export async function jobsView(main, jobs) {
  const list = make("tbody");
  const fill = () => list.replaceChildren(...[...jobs.values()].sort((a, b) => b.id - a.id).map(row));
  main.replaceChildren(make("h1", {}, "Jobs"), form(), make("table", { id: "jobs", style: "margin-top:1rem" },
    make("thead", {}, make("tr", {}, ["job", "kind", "run", "progress", "cost", "state"].map((t) => make("th", {}, t)))), list));
  fill();
  return { onJob: fill };
}

function row(job) {
  const p = job.progress, active = job.state === "queued" || job.state === "running", run = job.result?.results ? Object.keys(job.result.results).join(", ") : "";
  const stop = active ? make("button", { onclick: async (event) => {
    event.target.disabled = true;
    await postJson(`/jobs/${job.id}/cancel`, {}).catch((error) => event.target.replaceWith(problem(error)));
  } }, job.cancel ? "ending …" : "cancel") : null;
  return make("tr", { "data-job": job.id, "data-state": job.state }, make("td", {}, `${job.id}`), make("td", {}, job.kind), make("td", {}, make("a", { href: `#/run/${encodeURIComponent(job.run)}` }, job.run)),
    make("td", { style: "min-width:14rem" }, p.of ? [make("progress", { max: p.of, value: p.done }), make("span", { class: "soft" }, said(p, job))] : p.rows ? `reading text: ${count(p.rows, "sequence")}` : run),
    make("td", { class: "soft" }, price(job.price)), make("td", {}, make("span", { class: { done: "good", failed: "bad", cancelled: "warm" }[job.state] || "" }, job.state), " ", stop,
      job.error ? make("div", { class: "bad" }, job.error) : null));
}

function said(p, job) {
  const amount = p.unit === "bytes" ? `${bytes(p.done)} of ${bytes(p.of)}` : `${p.done.toLocaleString("en")} of ${count(p.of, p.unit.slice(0, -1))}`;
  const starts = job.starts > 1 ? `, started ${job.starts} times` : "";
  return `${p.phase === p.unit ? "" : `${p.phase}, `}${amount}${p.n_bytes ? `, ${bytes(p.n_bytes)}` : ""}${starts}`;
}

const price = (p) => [p.total_bytes && `writes ${bytes(p.total_bytes)}`, p.read_bytes && `reads ${bytes(p.read_bytes)}`, `${bytes(p.host_bytes)} of memory`].filter(Boolean).join(", ");

function form() {
  const kind = make("select", { id: "kind", "aria-label": "kind of job" }, ["extract", "analyze", "verify", "plateau", "patch", "ablate"].map((k) => make("option", {}, k)));
  const text = make("textarea", { id: "document", "aria-label": "job", rows: 7, spellcheck: "false" }, EXAMPLE), answer = make("div", { id: "answer" });
  const send = (path) => async () => {
    answer.replaceChildren(make("span", { class: "soft" }, "planning …"));
    try {
      const found = await postJson(path, { kind: kind.value, document: text.value });
      answer.replaceChildren(make("span", { class: "good" }, path === "/plan" ? `${found.run}: ${price(found.price)}` : `job ${found.id}: ${price(found.price)}`));
    } catch (error) {
      answer.replaceChildren(problem(error));
    }
  };
  const name = make("input", { id: "text-name", value: "my-text.txt", "aria-label": "name of the text" }), body = make("textarea", { id: "text", "aria-label": "text", rows: 7, placeholder: "paste a text here" });
  const file = make("input", { type: "file", "aria-label": "file of text", onchange: () => { if (file.files[0]) name.value = file.files[0].name.replaceAll(/[^\w.-]/g, "_"); } }), sent = make("span");
  const upload = async () => {
    try {
      const done = await putText(name.value, file.files[0] || body.value);
      sent.replaceChildren(make("span", { class: "good" }, `${done.text}, ${bytes(done.n_bytes)}`));
    } catch (error) {
      sent.replaceChildren(problem(error));
    }
  };
  return make("div", { class: "two" },
    make("section", { class: "card" }, make("h2", {}, "text"), body, make("div", { class: "row", style: "margin:.4rem 0 0" }, file, name, make("button", { id: "upload", onclick: upload }, "Send"), sent)),
    make("section", { class: "card" }, make("h2", {}, "job"), text, make("div", { class: "row", style: "margin:.4rem 0 0" }, kind,
      make("button", { id: "plan", onclick: send("/plan") }, "Price"), make("button", { id: "submit", class: "main", onclick: send("/jobs") }, "Submit"), answer)));
}
