// Looks every three seconds whether this page has changed, and shows what is new. What was opened stays open; nothing
// moves while text is selected or the page is not looked at.
"use strict";
const live = document.getElementById("live");
let shown = null;

async function look() {
  if (document.hidden || String(getSelection())) return;
  let text;
  try {
    const answer = await fetch(location.href, { redirect: "error" });
    if (!answer.ok) throw new Error(String(answer.status));
    text = await answer.text();
  } catch {
    live.textContent = "not connected: run metaclaw open again";
    live.className = "off";
    return;
  }
  live.textContent = "live";
  live.className = "on";
  if (text === shown) return;
  const fresh = new DOMParser().parseFromString(text, "text/html").getElementById("page");
  if (shown !== null && fresh) {
    const page = document.getElementById("page");
    for (const open of page.querySelectorAll("details[open][id]")) {
      const same = fresh.querySelector("#" + CSS.escape(open.id));
      if (same) same.open = true;
    }
    page.replaceWith(fresh);
  }
  shown = text;
}

look();
setInterval(look, 3000);
