// The indexing page: a folder is chosen, a run is watched, its report is shown.
const { $, say, fill, number, make, icon, api, problem, signs_in } = await import(`./page.js${new URL(import.meta.url).search}`);

let chosen = null, watching = false;
const is_over = ({ state }) => ["idle", "done", "stopped", "failed"].includes(state);

async function look_at(at) {
  problem();
  try {
    const found = await api(`v1/folders?at=${encodeURIComponent(at)}`);
    chosen = found.at;
    $("at").textContent = found.name || say.folders;
    const entry = (name, target, sign) => make("li", {}, make("button", { type: "button", onclick: () => look_at(target) }, icon(sign), name));
    $("folders").replaceChildren(...(found.above === null ? [] : [entry(say.above, found.above, "up-folder")]), ...found.folders.map((one) => entry(one.name, one.at, "folder")));
    $("left-out").hidden = !found.left_out; $("left-out").textContent = fill("folders_left_out", { count: found.left_out });
    $("start").disabled = !chosen;
    $("start").textContent = chosen ? fill("index_folder", { name: found.name }) : say.index;
  } catch (error) { problem(error); }
}

function duration(seconds) {
  const minutes = Math.round(seconds / 60);
  return seconds < 90 ? fill("seconds", { count: Math.max(1, Math.round(seconds)) }) : minutes < 90 ? fill("minutes", { count: minutes }) : fill("hours", { count: number(seconds / 3600, 1) });
}

function draw(run) {
  $("run").hidden = run.state === "idle";
  $("choose").hidden = !is_over(run);
  $("run-title").textContent = `${run.folder}: ${say[`run_${run.state}`]}`;
  const bar = $("progress");
  bar.hidden = is_over(run);
  if (run.total) { bar.max = run.total; bar.value = run.done; } else bar.removeAttribute("value");
  const parts = [run.total === null ? (is_over(run) ? "" : say.counting) : fill("done_of", { done: number(run.done), total: number(run.total) })];
  if (run.images_per_second && run.state !== "paused") parts.push(fill("rate", { rate: number(run.images_per_second, 1) }));
  if (run.state === "running" && run.total !== null) parts.push(run.seconds_left === null ? say.left_unknown : fill("left", { time: duration(run.seconds_left) }));
  if (is_over(run)) parts.push(duration(run.seconds));
  $("status").textContent = parts.filter(Boolean).join(" · ");
  $("pause").hidden = run.state !== "running"; $("resume").hidden = run.state !== "paused"; $("stop").hidden = is_over(run) || run.state === "stopping";
  if (!is_over(run)) { $("report").replaceChildren(); return; }
  if (run.error) problem(new Error(run.error));
  const counts = Object.entries(run.counts).map(([name, count]) => make("li", {}, `${number(count)} ${say[`count_${name}`]}`));
  const table = (heads, rows) => make("div", { className: "scroll", tabIndex: 0, role: "region", "aria-label": heads[0] }, make("table", {}, make("thead", {}, make("tr", {}, ...heads.map((head) => make("th", { scope: "col" }, head)))), make("tbody", {}, ...rows.map((row) => make("tr", {}, ...row.map((cell) => make("td", {}, cell)))))));
  const more = (run.counts.skipped ?? 0) - run.skipped.length;
  $("report").replaceChildren(
    ...(counts.length ? [make("ul", {}, ...counts)] : run.state === "done" ? [make("p", {}, say.no_images)] : []),
    ...run.notes.map((note) => make("p", { className: "quiet" }, note)),
    ...(run.skipped.length ? [make("h3", {}, say.skipped), table([say.file, say.reason], run.skipped.map((one) => [one.path, one.reason])), ...(more > 0 ? [make("p", {}, fill("skipped_more", { count: more }))] : [])] : []),
    ...(run.ignored.length ? [make("h3", {}, say.ignored), table([say.type, say.count, say.reason], run.ignored.map((one) => [one.kind, number(one.count), one.reason]))] : []));
}

async function watch() {
  if (watching) return;
  watching = true;
  try {
    for (;;) {
      const run = await api("v1/indexing");
      draw(run);
      if (is_over(run)) break;
      await new Promise((done) => setTimeout(done, 700));
    }
  } catch (error) { problem(error); } finally { watching = false; }
}

async function act(path, body = {}) {
  problem();
  try { draw(await api(`v1/indexing/${path}`, body)); watch(); } catch (error) { problem(error); }
}

if (!signs_in()) {
  $("choose").addEventListener("submit", (event) => { event.preventDefault(); act("start", { folder: chosen, prune: $("prune").checked, force: $("prune").checked && $("force").checked }); });
  $("prune").addEventListener("change", () => { $("force-field").hidden = !$("prune").checked; });
  for (const name of ["pause", "resume", "stop"]) $(name).addEventListener("click", () => act(name));
  await look_at("");
  await watch();
}
