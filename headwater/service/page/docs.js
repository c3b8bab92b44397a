// The OpenAPI document, as a page.

import { getJson } from "/page/api.js";
import { make, problem } from "/page/dom.js";

const main = document.getElementById("main");

if (localStorage.getItem("theme") === "dark") document.documentElement.dataset.theme = "dark";

function operation(path, method, found) {
  const body = found.requestBody?.content || {}, parameters = found.parameters || [];
  return make("section", { class: "card", style: "margin-bottom:.8rem" }, make("h2", {}, `${method.toUpperCase()} ${path}`),
    make("p", { style: "white-space:pre-line" }, found.description || found.summary),
    parameters.length ? make("table", {}, make("tr", {}, ["parameter", "in", "form", "default"].map((t) => make("th", {}, t))), parameters.map((p) => make("tr", {},
      make("td", {}, p.name + (p.required ? " *" : "")), make("td", {}, p.in), make("td", { class: "soft" }, form(p.schema)), make("td", {}, JSON.stringify(p.schema.default) ?? "")))) : null,
    Object.keys(body).map((kind) => make("p", {}, `body: ${kind} `, make("span", { class: "soft" }, form(body[kind].schema)))),
    make("p", { class: "soft" }, `answers: ${Object.keys(found.responses).join(", ")}`));
}

function form(schema = {}) {
  if (schema.$ref) return schema.$ref.split("/").pop();
  if (schema.anyOf) return schema.anyOf.map(form).join(" or ");
  return [schema.enum ? schema.enum.join(" | ") : schema.type, schema.format, schema.pattern, schema.description].filter(Boolean).join(", ");
}

getJson("/openapi.json").then((api) => main.replaceChildren(make("h1", {}, `${api.info.title} ${api.info.version}`), make("p", {}, api.info.description),
  ...Object.entries(api.paths).flatMap(([path, methods]) => Object.entries(methods).map(([method, found]) => operation(path, method, found))),
  make("h1", {}, "forms"), ...Object.entries(api.components.schemas).map(([name, schema]) => make("section", { class: "card", style: "margin-bottom:.8rem" },
    make("h2", {}, name), make("pre", {}, JSON.stringify(schema, null, 1)))))).catch((error) => main.replaceChildren(problem(error)));
