"""What keeps an open page up to date."""

from __future__ import annotations

SCRIPT = """
(function () {
  const main = document.querySelector("main"), live = document.getElementById("live");
  let tag = document.body.dataset.tag, seconds = Number(document.body.dataset.seconds);
  const boxes = () => [...main.querySelectorAll("details,.scroll,a,progress")];
  function put(text) {
    const before = boxes().map(b => [b.open, b.scrollLeft]), focus = boxes().indexOf(document.activeElement);
    const top = window.scrollY;
    main.innerHTML = text;
    boxes().forEach((b, i) => {
      if (!before[i]) return;
      if (b.tagName === "DETAILS") b.open = before[i][0];
      b.scrollLeft = before[i][1];
    });
    if (focus >= 0 && boxes()[focus]) boxes()[focus].focus({preventScroll: true});
    window.scrollTo(window.scrollX, top);
  }
  const say = () => live.textContent = "Kept up to date every " + seconds + " s.";
  async function look() {
    try {
      const answer = await fetch("?body", {headers: {"If-None-Match": tag}, cache: "no-store"});
      if (answer.status === 200) {
        const text = await answer.text();
        if (document.getSelection().isCollapsed) {
          put(text);
          tag = answer.headers.get("ETag");
          document.title = decodeURIComponent(answer.headers.get("X-Title"));
        }
      }
      seconds = Number(answer.headers.get("X-Seconds")) || seconds;
      say();
    } catch (error) {
      live.textContent = "`stepdistill watch` has ended: this page shows what was last known.";
    }
    setTimeout(look, 1000 * seconds);
  }
  say();
  setTimeout(look, 1000 * seconds);
})();
"""
