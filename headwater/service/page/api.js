// Requests to the server, .npy files, and the stream of jobs.

export class Refusal extends Error {
  constructor(status, detail) {
    super(detail);
    this.status = status;
  }
}

async function ask(path, options) {
  const answer = await fetch(path, options);
  if (answer.ok) return answer;
  let detail = `the server answered with status ${answer.status}.`;
  try {
    detail = (await answer.json()).detail;
  } catch { /* an answer without JSON */ }
  throw new Refusal(answer.status, detail);
}

export const getJson = async (path) => (await ask(path)).json();

export const postJson = async (path, value) =>
  (await ask(path, { method: "POST", headers: { "content-type": "application/json" }, body: JSON.stringify(value) })).json();

export const putText = async (name, data) =>
  (await ask(`/texts/${encodeURIComponent(name)}`, { method: "PUT", body: data })).json();

export const runPath = (name, tail) => `/runs/${name.split("/").map(encodeURIComponent).join("/")}/${tail}`;

export const slicePath = (name, site, places) => runPath(name, `arrays/${site}?${new URLSearchParams(places)}`);

export async function getNpy(path) {
  const answer = await ask(path);
  return { ...readNpy(await answer.arrayBuffer()), dims: (answer.headers.get("x-headwater-dims") || "").split(",") };
}

export function readNpy(buffer) {
  const size = new DataView(buffer).getUint16(8, true);
  const header = new TextDecoder().decode(new Uint8Array(buffer, 10, size));
  const kind = header.match(/'descr': '([^']+)'/)[1];
  const shape = header.match(/'shape': \(([^)]*)\)/)[1].split(",").filter((s) => s.trim()).map(Number);
  const raw = buffer.slice(10 + size);
  const kinds = { "<f4": Float32Array, "<f8": Float64Array, "<i4": Int32Array, "|u1": Uint8Array, "|b1": Uint8Array };
  if (kind === "<f2") return { shape, values: fromHalf(new Uint16Array(raw)) };
  if (kind === "<i8") return { shape, values: Float64Array.from(new BigInt64Array(raw), Number) };
  return { shape, values: new kinds[kind](raw) };
}

let halves = null;

function fromHalf(bits) {
  if (!halves) {
    halves = new Float32Array(65536);
    for (let i = 0; i < 65536; i++) {
      const sign = i & 0x8000 ? -1 : 1, exponent = (i >> 10) & 31, fraction = i & 1023;
      halves[i] = sign * (exponent === 0 ? fraction * 2 ** -24
        : exponent === 31 ? (fraction ? NaN : Infinity) : (1 + fraction / 1024) * 2 ** (exponent - 15));
    }
  }
  return Float32Array.from(bits, (b) => halves[b]);
}

export function follow(since, onJob, onState) {
  const stream = new EventSource(`/events?since=${since}`);
  stream.addEventListener("job", (event) => onJob(JSON.parse(event.data)));
  stream.addEventListener("open", () => onState(true));
  stream.addEventListener("error", () => onState(false));
  return stream;
}
