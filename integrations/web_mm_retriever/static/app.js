// The page: one state, held by the address bar; everything else is drawn from it and from the API's answers.
const { $, say, fill, number, make, icon, api, lines, problem, signs_in } = await import(`./page.js${new URL(import.meta.url).search}`);
const PAGE = 40;

// ---------------------------------------------------------------------------------------- the state and the address

let state, info, names = {}, under_way = null, shown = [], next = null;

function read_address() {
  const given = new URLSearchParams(location.search);
  const balance = parseFloat(given.get("b"));
  let filters = [];
  try { filters = JSON.parse(given.get("w") || "[]"); } catch { /* someone's own address: no filters */ }
  return {
    text: given.get("q") || "", images: given.getAll("i"), avoid: given.get("no") || "",
    balance: balance >= 0 && balance <= 1 ? balance : 0.5, liked: given.getAll("up"), disliked: given.getAll("down"),
    filters: Array.isArray(filters) ? filters : [], hybrid: given.get("h") === "1", others: given.get("o") === "1",
  };
}

function address_of(query) {
  const parts = new URLSearchParams();
  if (query.text) parts.set("q", query.text);
  for (const image of query.images) parts.append("i", image);
  if (query.avoid) parts.set("no", query.avoid);
  if (query.balance !== 0.5) parts.set("b", query.balance);
  for (const id of query.liked) parts.append("up", id);
  for (const id of query.disliked) parts.append("down", id);
  if (query.filters.length) parts.set("w", JSON.stringify(query.filters));
  if (query.hybrid) parts.set("h", "1");
  if (query.others) parts.set("o", "1");
  const lang = new URLSearchParams(location.search).get("lang");
  if (lang) parts.set("lang", lang);
  return `?${parts}`;
}

function go(changes) {
  state = { ...state, ...changes };
  const address = address_of(state);
  if (address !== location.search) history.pushState(null, "", address);
  draw_query();
  return search();
}

const is_asked = () => Boolean(state.text.trim() || state.images.length || state.liked.length);

function request(skip) {
  return {
    text: state.text, image: state.images[0] || null, images: state.images.slice(1), balance: state.balance,
    avoid: state.avoid.split(",").map((words) => words.trim()).filter(Boolean), liked: state.liked,
    disliked: state.disliked, filters: state.filters, hybrid: state.hybrid, top_k: PAGE, skip,
    exclude_image: state.images.length ? state.others || Boolean(state.text.trim()) : null,
  };
}

// ---------------------------------------------------------------------------------------- searching

async function search(skip = 0) {
  under_way?.abort(); if (!skip) ranking?.abort();
  const mine = (under_way = new AbortController());
  problem();
  if (!skip) { next = null; $("more").hidden = true; }
  if (!is_asked()) {
    shown = []; $("results").replaceChildren(); $("tools").hidden = true;
    $("status").textContent = say.start; draw_rerank(); count_facets();
    return;
  }
  if (!skip) $("status").textContent = say.searching;
  try {
    const found = await api("v1/search", request(skip), { signal: mine.signal });
    shown = skip ? [...shown, ...found.results] : found.results;
    next = found.next;
    const cards = found.results.map(card);
    if (skip) $("results").append(...cards); else $("results").replaceChildren(...cards);
    const facts = { count: shown.length, seconds: number(found.seconds, 2) };
    $("status").textContent = shown.length ? fill(next ? "found_more" : "found", facts) : `${say.nothing} ${found.hint}`;
    $("tools").hidden = !shown.length;
    $("more").hidden = next === null;
    draw_rerank();
    if (!skip) count_facets();
  } catch (error) {
    if (error.name !== "AbortError") { $("status").textContent = ""; if (!skip) $("results").replaceChildren(); }
    problem(error);
  }
}

const more = () => { if (next !== null && !$("more").disabled) { $("more").disabled = true; search(next).finally(() => { $("more").disabled = false; }); } };

function title(one) { return one.label || one.text || one.metadata.file_name || one.id; }

function card(one) {
  names[one.id] = title(one);
  const best = Math.max(...shown.map((other) => other.score ?? 0), 1e-9);
  const bar = make("div");
  bar.style.width = `${Math.max(0, Math.min(1, (one.score ?? 0) / Math.max(best, state.hybrid ? 0 : 1))) * 100}%`;
  const vote = (kind, sign) => make("button", {
    type: "button", className: "vote", "aria-pressed": String(state[kind].includes(one.id)), "aria-label": `${say[kind === "liked" ? "up" : "down"]}: ${title(one)}`,
    title: say[kind === "liked" ? "up" : "down"], onclick: () => rate(kind, one.id),
  }, icon(sign));
  const open = make("button", { type: "button", className: "open", onclick: () => show(one) },
    make("img", { src: one.thumbnail, alt: title(one), loading: "lazy", decoding: "async", width: 256, height: 256 }),
    one.copies ? make("span", { className: "copies" }, fill("copies", { count: one.copies + 1 })) : null);
  const other_name = one.metadata.file_name && one.metadata.file_name !== title(one) ? one.metadata.file_name : "";
  return make("li", { className: "card", "data-id": one.id }, open,
    make("p", { className: "name" }, title(one)),
    other_name ? make("p", { className: "note" }, other_name) : null,
    one.note ? make("p", { className: "note" }, one.note) : null,
    one.moved ? make("p", { className: "note moved" }, one.moved) : null,
    one.reason ? make("p", { className: "reason" }, one.reason) : null,
    make("div", { className: "score" }, make("div", { className: "track", "aria-hidden": "true" }, bar),
      make("span", { "aria-label": `${say.score} ${one.score?.toFixed(3)}` , role: "img" }, one.score === null ? "" : one.score.toFixed(3))),
    make("div", { className: "acts" },
      make("button", { type: "button", onclick: () => similar(one) }, say.similar),
      make("button", { type: "button", onclick: () => similar_but(one) }, say.similar_but),
      make("div", { className: "votes" }, vote("liked", "up"), vote("disliked", "down"))));
}

const similar = (one, text = "") => { names[one.id] = title(one); $("lightbox").close(); return go({ text, images: [one.id], others: true, liked: [], disliked: [], balance: 0.5 }); };

async function ask(label, value = "") {
  $("ask-label").textContent = label; $("ask-text").value = value; $("ask").returnValue = "";
  $("ask").showModal();
  $("ask-text").focus();
  await new Promise((done) => $("ask").addEventListener("close", done, { once: true }));
  return $("ask").returnValue === "ok" ? $("ask-text").value.trim() : "";
}

async function similar_but(one) {
  const change = await ask(say.similar_but_label);
  if (change) similar(one, change);
}

function rate(kind, id) {
  const other = kind === "liked" ? "disliked" : "liked";
  const had = state[kind].includes(id);
  keep_rating(id, had ? "none" : kind === "liked" ? "up" : "down");
  go({ [kind]: had ? state[kind].filter((one) => one !== id) : [...state[kind], id], [other]: state[other].filter((one) => one !== id) });
}

// Ratings are an evaluation set: what is right for words, for an image, or for both.
async function keep_rating(id, rating) {
  if (!info?.ratings) return;
  const text = state.text.trim();
  if (!text && !state.images.length) return;
  if (state.images.length > 1 || state.avoid.trim() || state.balance !== 0.5) { tell_ratings(say.rating_not_kept); return; }
  try {
    info.ratings = await api("v1/rate", { text, image: state.images[0] || null, id, rating });
    tell_ratings();
  } catch (error) { tell_ratings(error.message); }
}

function tell_ratings(problem = "") {
  const { queries, waiting, place, download } = info.ratings;
  const link = download && queries ? make("a", { href: "v1/ratings", download: "queries.jsonl" }, say.ratings_download) : null;
  $("rated").replaceChildren(problem || fill("ratings_kept", { count: queries, place }), waiting && !problem ? ` ${fill("ratings_waiting", { count: waiting })}` : "", " ", ...(link ? [link] : []));
  $("rated").hidden = false;
}

// ---------------------------------------------------------------------------------------- ranking by the server's model

let ranking = null;
const rank_count = () => Math.min(info?.rerank_count ?? 0, shown.length);

function draw_rerank() {
  const count = rank_count();
  $("rerank").hidden = !info?.rerank || count < 2 || !(state.text.trim() || state.images.length) || Boolean(ranking);
  const seconds = info?.rerank_seconds;
  $("rerank").textContent = fill(typeof seconds === "number" ? "rerank_seconds" : "rerank_unknown", { count, model: info?.rerank, seconds: number((seconds ?? 0) * count, seconds * count < 10 ? 1 : 0) });
}

async function rerank() {
  const mine = (ranking = new AbortController());
  const best = shown.slice(0, rank_count());
  problem(); draw_rerank();
  $("ranking").hidden = false; $("rank-stop").focus();
  let is_done = false;
  try {
    const body = { text: state.text, image: state.images[0] || null, ids: best.map((one) => one.id), scores: best.map((one) => one.score) };
    for await (const event of lines("v1/rerank", body, { signal: mine.signal })) {
      if (event.event === "waiting" || event.event === "running") draw_ranking(event);
      else if (event.event === "failed") throw new Error(fill("rerank_failed", { reason: event.error }));
      else { is_done = true; put_in_order(best, event); info.rerank_seconds = event.seconds / best.length; }
    }
    if (!is_done) throw new Error(fill("rerank_failed", { reason: say.gone }));
  } catch (error) {
    if (error.name === "AbortError" && ranking === mine) $("status").textContent = say.rerank_stopped;
    problem(error);
  } finally {
    if (ranking === mine) {
      const focused = document.activeElement === $("rank-stop");
      ranking = null; $("ranking").hidden = true; draw_rerank();
      if (focused) $("rerank").focus();
    }
  }
}

function draw_ranking({ event, expected_seconds, seconds, passes }) {
  const bar = $("rank-progress");
  if (event === "running" && expected_seconds) { bar.max = expected_seconds; bar.value = Math.min(seconds, expected_seconds * 0.98); } else bar.removeAttribute("value");
  const facts = { seconds: number(seconds, 0), expected: number(expected_seconds ?? 0, expected_seconds < 10 ? 1 : 0), passes };
  $("rank-status").textContent = event === "waiting" ? say.rank_waiting : fill(expected_seconds ? "rank_running" : "rank_running_unknown", facts);
}

function put_in_order(best, event) {
  const before = new Map([...document.querySelectorAll(".card")].map((one) => [one.dataset.id, one.getBoundingClientRect()]));
  const by_id = new Map(best.map((one, place) => [one.id, { one, place }]));
  const ranked = event.results.map((result, place) => {
    const { one, place: was } = by_id.get(result.id);
    const moved = [was === place ? "" : fill("moved_from", { place: was + 1 }), result.score === null ? "" : fill("model_score", { score: number(result.score, 3) })];
    return { ...one, rank: place + 1, reason: result.reason, note: result.note || one.note, moved: moved.filter(Boolean).join(" · ") };
  });
  shown = [...ranked, ...shown.slice(ranked.length)];
  $("results").replaceChildren(...shown.map(card));
  $("status").textContent = fill("reranked", { count: ranked.length, model: info.rerank, seconds: number(event.seconds, 1) }) + (state.liked.length || state.disliked.length || state.avoid.trim() || state.images.length > 1 ? ` ${say.rerank_saw}` : "");
  if (matchMedia("(prefers-reduced-motion: reduce)").matches) return;
  for (const one of document.querySelectorAll(".card")) {
    const was = before.get(one.dataset.id), is = one.getBoundingClientRect();
    if (was && (was.left !== is.left || was.top !== is.top)) one.animate([{ transform: `translate(${was.left - is.left}px, ${was.top - is.top}px)` }, { transform: "none" }], { duration: 500, easing: "ease-in-out" });
  }
}

// ---------------------------------------------------------------------------------------- the query

function draw_query() {
  $("text").value = state.text; $("avoid").value = state.avoid; $("balance").value = state.balance; $("hybrid").checked = state.hybrid;
  $("balance-field").hidden = !(state.images.length && state.text.trim());
  const chip = (name, image, without) => make("li", {},
    image ? make("img", { src: `v1/thumbnail?id=${encodeURIComponent(image)}`, alt: "" }) : null, make("span", {}, name),
    make("button", { type: "button", "aria-label": `${say.remove}: ${name}`, onclick: () => { go(without); $("text").focus(); } }, icon("close")));
  const is_url = (image) => /^https?:/.test(image);
  const drop = (kind, id) => ({ [kind]: state[kind].filter((one) => one !== id) });
  $("chips").replaceChildren(
    ...state.images.map((id) => chip(names[id] || (is_url(id) ? id : say.part), is_url(id) ? "" : id, drop("images", id))),
    ...state.liked.map((id) => chip(fill("liked", { name: names[id] || say.part }), id, drop("liked", id))),
    ...state.disliked.map((id) => chip(fill("disliked", { name: names[id] || say.part }), id, drop("disliked", id))),
    ...(state.avoid.trim() ? [chip(fill("without", { words: state.avoid }), "", { avoid: "" })] : []),
    ...state.filters.map((one) => chip(`${one.key} ${one.operator} ${one.value}`, "", { filters: state.filters.filter((other) => other !== one) })));
}

async function give(files, name = "") {
  const images = [...files].filter((file) => file.type.startsWith("image/") || !file.type);
  if (!images.length) return;
  problem(); $("status").textContent = say.uploading;
  try {
    const given = [];
    for (const file of images) {
      const kept = await api("v1/uploads", undefined, { method: "POST", body: file, headers: { "Content-Type": file.type || "image/unknown" } });
      names[kept.image] = name || file.name || say.part;
      given.push(kept.image);
    }
    await go({ text: $("text").value, images: [...new Set([...state.images.filter((one) => one.startsWith("upload:")), ...given])], others: false });
  } catch (error) { $("status").textContent = ""; problem(error); }
}

// ---------------------------------------------------------------------------------------- facets

let counting = 0;
async function count_facets() {
  const mine = ++counting;
  try {
    const counted = await api("v1/facets", { filters: state.filters });
    if (mine !== counting) return;
    $("facets").hidden = !counted.facets.length;
    if (matchMedia("(min-width: 900px)").matches) $("facets").open = true;
    $("facet-list").replaceChildren(...counted.facets.map(facet), ...(counted.complete ? [] : [make("p", { className: "quiet" }, fill("facet_note", counted))]));
  } catch (error) { problem(error); }
}

function facet(one) {
  const others = state.filters.filter((filter) => filter.key !== one.key);
  const set = (more) => go({ filters: [...others, ...more] });
  if (!one.values.length) {
    const bound = (operator) => state.filters.find((filter) => filter.key === one.key && filter.operator === operator)?.value ?? "";
    const field = (label, operator, hint) => make("input", { type: "number", step: "any", placeholder: String(hint), value: bound(operator), "aria-label": `${one.key} ${label}`, "data-operator": operator });
    const low = field(say.from, ">=", one.least), high = field(say.to, "<=", one.most);
    const change = () => set([low, high].filter((input) => input.value !== "").map((input) => ({ key: one.key, operator: input.dataset.operator, value: Number(input.value) })));
    for (const input of [low, high]) input.addEventListener("change", change);
    return make("fieldset", {}, make("legend", {}, one.key), make("label", {}, low), make("label", {}, high));
  }
  const chosen = state.filters.find((filter) => filter.key === one.key && filter.operator === "in")?.value ?? [];
  const toggle = (value) => {
    const values = chosen.includes(value) ? chosen.filter((other) => other !== value) : [...chosen, value];
    set(values.length ? [{ key: one.key, operator: "in", value: values }] : []);
  };
  return make("fieldset", {}, make("legend", {}, one.key), ...one.values.slice(0, 12).map(({ value, count }) =>
    make("label", {}, make("input", { type: "checkbox", checked: chosen.includes(value), onchange: () => toggle(value) }), make("span", {}, String(value)), make("span", { className: "quiet" }, String(count)))));
}

// ---------------------------------------------------------------------------------------- the lightbox

let looked_at = null, zoom = 1, region = null;
function show(one) {
  looked_at = one;
  $("light-title").textContent = title(one);
  $("light-image").src = `${one.thumbnail}&side=1600`; $("light-image").alt = title(one);
  $("light-download").href = `${one.original}&download=1`;
  const facts = { ...(one.score === null ? {} : { [say.score]: one.score.toFixed(4) }), ...one.metadata, ...(one.text ? { text: one.text } : {}), ...(one.note ? { note: one.note } : {}), id: one.id };
  $("light-facts").replaceChildren(...Object.entries(facts).flatMap(([name, value]) => [make("dt", {}, name), make("dd", {}, Array.isArray(value) ? value.join(", ") : String(value))]));
  zoom_to(1); cut(false);
  if (!$("lightbox").open) $("lightbox").showModal();
}

function zoom_to(factor) {
  zoom = Math.min(8, Math.max(1, factor));
  const image = $("light-image");
  $("stage").classList.toggle("zoomed", zoom > 1);
  image.style.width = zoom > 1 ? `${image.naturalWidth ? Math.min(image.naturalWidth, $("stage").clientWidth) * zoom : 100}px` : "";
}

function step(by) {
  const place = shown.findIndex((one) => one.id === looked_at?.id) + by;
  if (shown[place]) show(shown[place]);
}

function cut(on) {
  region = null;
  $("region").hidden = true; $("cut-help").hidden = !on;
  $("stage").classList.toggle("cutting", on);
  document.querySelector("[data-do=cut]").setAttribute("aria-pressed", String(on));
  if (on) {
    zoom_to(1);
    const box = $("light-image").getBoundingClientRect();
    mark(box.left + box.width / 4, box.top + box.height / 4, box.left + box.width * 0.75, box.top + box.height * 0.75);
    $("stage").focus();
  }
}
const is_cutting = () => $("stage").classList.contains("cutting");

function mark(x0, y0, x1, y1) {
  const image = $("light-image").getBoundingClientRect(), stage = $("stage").getBoundingClientRect();
  const within = (value, least, most) => Math.min(most, Math.max(least, value));
  const left = within(Math.min(x0, x1), image.left, image.right), right = within(Math.max(x0, x1), image.left, image.right);
  const top = within(Math.min(y0, y1), image.top, image.bottom), bottom = within(Math.max(y0, y1), image.top, image.bottom);
  region = { left, top, right, bottom };
  Object.assign($("region").style, { left: `${left - stage.left + $("stage").scrollLeft}px`, top: `${top - stage.top + $("stage").scrollTop}px`, width: `${right - left}px`, height: `${bottom - top}px` });
  $("region").hidden = false;
}

async function use_region() {
  const image = $("light-image"), box = image.getBoundingClientRect();
  const scale = image.naturalWidth / box.width;
  const width = Math.round((region.right - region.left) * scale), height = Math.round((region.bottom - region.top) * scale);
  if (width < 8 || height < 8) return;
  const canvas = make("canvas", { width, height });
  canvas.getContext("2d").drawImage(image, (region.left - box.left) * scale, (region.top - box.top) * scale, width, height, 0, 0, width, height);
  const part = await new Promise((done) => canvas.toBlob(done, "image/png"));
  $("lightbox").close();
  state = { ...state, images: [], text: "" }; $("text").value = "";
  await give([part], say.region);
}

// ---------------------------------------------------------------------------------------- export

function save(kind) {
  const rows = shown.map((one) => ({ rank: one.rank, id: one.id, score: one.score, label: one.label, ...(one.reason ? { reason: one.reason } : {}), ...one.metadata }));
  const keys = [...new Set(rows.flatMap(Object.keys))];
  const cell = (value) => { const text = String(value ?? ""); const safe = /^[=+\-@\t\r]/.test(text) && isNaN(text) ? `'${text}` : text; return /[",\n\r]/.test(safe) ? `"${safe.replaceAll('"', '""')}"` : safe; };
  const made = {
    json: () => JSON.stringify({ query: request(0), results: rows }, null, 2),
    csv: () => [keys.map(cell), ...rows.map((row) => keys.map((key) => cell(row[key])))].map((line) => line.join(",")).join("\r\n"),
    html: () => {
      const page = document.implementation.createHTMLDocument(`${say.title}: ${state.text}`);
      page.body.append(make("h1", {}, `${say.title}: ${state.text}`), make("table", {}, make("tr", {}, ...keys.map((key) => make("th", {}, key))), ...rows.map((row) => make("tr", {}, ...keys.map((key) => make("td", {}, String(row[key] ?? "")))))));
      return `<!doctype html><meta charset="utf-8">${page.documentElement.outerHTML}`;
    },
  }[kind]();
  const types = { json: "application/json", csv: "text/csv", html: "text/html" };
  const link = make("a", { href: URL.createObjectURL(new Blob([made], { type: types[kind] })), download: `results.${kind}` });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
  $("status").textContent = say.exported;
}

// ---------------------------------------------------------------------------------------- what people do

function keys(event) {
  const typing = event.target.matches("input:not([type=checkbox]):not([type=range]), textarea");
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  if ($("lightbox").open) return light_keys(event);
  if (typing || document.querySelector("dialog[open]")) { if (event.key === "Escape" && event.target === $("text")) $("text").blur(); return; }
  const cards = [...document.querySelectorAll(".card .open")];
  const place = cards.indexOf(document.activeElement?.closest(".card")?.querySelector(".open"));
  const columns = getComputedStyle($("results")).gridTemplateColumns.split(" ").length;
  const steps = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: columns, ArrowUp: -columns };
  if (event.key === "/") { event.preventDefault(); $("text").focus(); $("text").select(); }
  else if (event.key in steps && !event.target.matches("input")) {
    const target = cards[place < 0 ? 0 : place + steps[event.key]];
    if (target) { event.preventDefault(); target.focus(); }
  } else if (event.key === "s" && place >= 0) similar(shown[place]);
}

function light_keys(event) {
  if (is_cutting()) {
    const move = { ArrowRight: [8, 0], ArrowLeft: [-8, 0], ArrowDown: [0, 8], ArrowUp: [0, -8] }[event.key];
    if (move && region) {
      event.preventDefault();
      const [x, y] = move, grow = event.shiftKey;
      mark(region.left + (grow ? 0 : x), region.top + (grow ? 0 : y), region.right + x, region.bottom + y);
    } else if (event.key === "Enter" && region && document.activeElement === $("stage")) { event.preventDefault(); use_region(); }
    else if (event.key === "Escape") { event.preventDefault(); cut(false); }
    return;
  }
  if (event.key === "ArrowRight") step(1);
  else if (event.key === "ArrowLeft") step(-1);
  else if (event.key === "+") zoom_to(zoom * 1.5);
  else if (event.key === "-") zoom_to(zoom / 1.5);
  else if (event.key === "s") similar(looked_at);
}

function listen_to_stage() {
  let start = null, corner = null;
  $("stage").addEventListener("pointerdown", (event) => { if (is_cutting() && event.button === 0) { start = corner || [event.clientX, event.clientY]; $("stage").setPointerCapture(event.pointerId); } });
  $("stage").addEventListener("pointermove", (event) => { if (is_cutting() && (start || corner)) mark(...(start || corner), event.clientX, event.clientY); });
  $("stage").addEventListener("pointerup", (event) => {
    if (!is_cutting() || !start) return;
    const moved = Math.hypot(event.clientX - start[0], event.clientY - start[1]) > 6;
    if (moved) { mark(...start, event.clientX, event.clientY); corner = null; use_region(); } else corner = start;  // a click: the first of two corners
    start = null;
  });
  $("stage").addEventListener("wheel", (event) => { if (!is_cutting()) { event.preventDefault(); zoom_to(zoom * (event.deltaY < 0 ? 1.2 : 1 / 1.2)); } }, { passive: false });
}

function listen() {
  $("search").addEventListener("submit", (event) => { event.preventDefault(); go({ text: $("text").value.trim(), avoid: $("avoid").value.trim(), hybrid: $("hybrid").checked }); });
  $("avoid").addEventListener("change", () => go({ text: $("text").value.trim(), avoid: $("avoid").value.trim() }));
  $("balance").addEventListener("change", () => go({ balance: Number($("balance").value) }));
  $("hybrid").addEventListener("change", () => go({ hybrid: $("hybrid").checked }));
  for (const id of ["file", "camera"]) $(id).addEventListener("change", () => { give($(id).files).finally(() => { $(id).value = ""; }); });
  $("url").addEventListener("click", async () => { const url = await ask(say.url_label); if (url) go({ text: $("text").value, images: [url], others: false }); });
  document.addEventListener("paste", (event) => { const files = [...event.clipboardData.files]; if (files.length) { event.preventDefault(); give(files); } });
  let inside = 0;
  const has_files = (event) => [...(event.dataTransfer?.types || [])].includes("Files");
  document.addEventListener("dragenter", (event) => { if (has_files(event)) { inside += 1; $("drop").hidden = false; } });
  document.addEventListener("dragleave", (event) => { if (has_files(event)) { inside = Math.max(0, inside - 1); $("drop").hidden = inside === 0; } });
  document.addEventListener("dragover", (event) => { if (has_files(event)) event.preventDefault(); });
  document.addEventListener("drop", (event) => { if (has_files(event)) { event.preventDefault(); inside = 0; $("drop").hidden = true; give(event.dataTransfer.files); } });
  document.addEventListener("keydown", keys);
  window.addEventListener("popstate", () => { $("lightbox").close(); state = read_address(); draw_query(); search(); });
  $("more").addEventListener("click", more);
  $("rerank").addEventListener("click", rerank);
  $("rank-stop").addEventListener("click", () => ranking?.abort());
  new IntersectionObserver((seen) => { if (seen[0].isIntersecting) more(); }, { rootMargin: "600px" }).observe($("more"));
  for (const button of document.querySelectorAll("[data-export]")) button.addEventListener("click", () => save(button.dataset.export));
  const acts = { in: () => zoom_to(zoom * 1.5), out: () => zoom_to(zoom / 1.5), cut: () => cut(!is_cutting()), similar: () => similar(looked_at), close: () => $("lightbox").close(), reveal: () => api("v1/reveal", { id: looked_at.id }).catch((error) => { $("lightbox").close(); problem(error); }) };
  for (const button of document.querySelectorAll("[data-do]")) button.addEventListener("click", acts[button.dataset.do]);
  listen_to_stage();
}

async function start() {
  if (signs_in()) return;
  listen();
  state = read_address();
  draw_query();  // before anything is waited for: what is typed meanwhile stays
  $("text").disabled = $("avoid").disabled = false;  // before, nothing listened to Enter
  try {
    info = await api("v1/info");
    $("about").textContent = fill("about", { rows: number(info.rows), model: info.model });
    $("hybrid-field").hidden = !info.hybrid; $("url").hidden = !info.urls;
    $("reveal").hidden = !info.shows_folders; $("to-indexing").hidden = !info.indexing; $("to-review").hidden = !info.review;
    if (info.ratings?.queries) tell_ratings();
    if (info.draws_only) $("banners").append(make("p", { className: "banner" }, say.tiny));
  } catch (error) { problem(error); }
  await search();
}

await start();
