// The review page: one drafted query at a time is kept, corrected or dropped.
const { $, say, fill, make, api, problem, signs_in } = await import(`./page.js${new URL(import.meta.url).search}`);

let draft = null, after = "";

function draw(state) {
  draft = state.draft;
  $("status").textContent = fill(draft ? "review_left" : "reviewed", state);
  $("review").hidden = !draft;
  if (!draft) return;
  const figure = (title, place) => make("figure", {}, make("figcaption", {}, title), make("img", { src: `v1/review/image?id=${encodeURIComponent(draft.id)}&place=${place}`, alt: title }));
  $("pair").replaceChildren(...(draft.image ? [figure(say.has, 0)] : []), ...Array.from({ length: draft.targets }, (_, place) => figure(say.looks_for, place + 1)));
  $("words").value = draft.text;
  $("note").textContent = draft.note;
  $("words").focus();
}

async function show(path, body) {
  problem();
  for (const button of document.querySelectorAll("#review button")) button.disabled = true;  // a second press would judge the next one
  try { draw(await api(path, body)); } catch (error) { problem(error); }
  for (const button of document.querySelectorAll("#review button")) button.disabled = false;
}

const judge = (verdict) => show("v1/review/verdict", { id: draft.id, verdict, text: $("words").value, after });

if (!signs_in()) {
  $("review").addEventListener("submit", (event) => { event.preventDefault(); judge("keep"); });
  $("drop-query").addEventListener("click", () => judge("drop"));
  $("later").addEventListener("click", () => { after = draft.id; show(`v1/review?after=${encodeURIComponent(after)}`); });
  await show("v1/review");
}
