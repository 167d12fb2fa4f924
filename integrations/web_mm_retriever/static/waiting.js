// While the weights of the model are downloaded: the page asks for itself again and again, until it is another one.
for (;;) {
  await new Promise((done) => setTimeout(done, 1000));
  let page;
  try { page = new DOMParser().parseFromString(await (await fetch(location.href)).text(), "text/html"); } catch { continue; }  // between two servers
  const now = page.getElementById("waiting");
  if (!now) { location.reload(); break; }
  const here = document.getElementById("waiting");
  here.querySelector(".quiet").textContent = now.querySelector(".quiet").textContent;
  const bar = now.querySelector("progress");
  if (bar.hasAttribute("value")) { here.querySelector("progress").max = bar.max; here.querySelector("progress").value = bar.value; }
}
