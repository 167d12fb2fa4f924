// What both pages are made with: the words of the language, elements, icons, and requests.
export const $ = (id) => document.getElementById(id);
export const lang = document.documentElement.lang;
export const say = (await (await fetch("static/strings.json")).json())[lang];
export const fill = (key, facts = {}) => say[key].replace(/{(\w+)}/g, (_, name) => facts[name]);
export const number = (value, digits = 0) => value.toLocaleString(lang, { maximumFractionDigits: digits });

export function make(tag, facts = {}, ...inside) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(facts)) {
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else if (name in made && name !== "list") made[name] = value;
    else made.setAttribute(name, value);
  }
  made.append(...inside.filter((one) => one !== null && one !== undefined));
  return made;
}

export function icon(name) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  made.setAttribute("class", "icon");
  made.setAttribute("aria-hidden", "true");
  made.append(document.createElementNS("http://www.w3.org/2000/svg", "use"));
  made.firstChild.setAttribute("href", `#i-${name}`);
  return made;
}

export async function ask_server(path, body, options = {}) {
  let answer;
  try {
    const json = body === undefined ? {} : { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body) };
    answer = await fetch(path, { ...json, ...options });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Error(say.gone);
  }
  if (!answer.ok) throw new Error((await answer.json().catch(() => ({}))).error || answer.statusText);
  return answer;
}

export async function api(path, body, options) {
  const answer = await ask_server(path, body, options);
  return answer.status === 204 ? null : answer.json();
}

// The lines of an answer, as they come.
export async function* lines(path, body, options) {
  const reader = (await ask_server(path, body, options)).body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const parts = (rest + value).split("\n");
    rest = parts.pop();
    for (const part of parts) if (part) yield JSON.parse(part);
  }
}

export function problem(error) {
  if (error?.name === "AbortError") return;
  $("problem").textContent = error ? error.message || String(error) : "";
}

// Whether somebody has to sign in first; then the form does it.
export function signs_in() {
  for (const link of document.querySelectorAll("[data-lang]")) link.addEventListener("click", (event) => { event.preventDefault(); const parts = new URLSearchParams(location.search); parts.set("lang", link.dataset.lang); location.search = parts; });
  if (document.body.dataset.admitted === "yes") return false;
  $("enter").addEventListener("submit", async (event) => {
    event.preventDefault();
    try { await api("enter", { token: $("token").value }); location.reload(); } catch (error) { problem(error); }
  });
  $("token").disabled = false;  // before, nothing listened to Enter
  return true;
}
