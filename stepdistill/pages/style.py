"""The one style sheet of all pages: dark and light as the reader's system is, and nothing cut on a narrow screen."""

STYLE = """
:root{color-scheme:light dark;--paper:#fff;--ink:#1b1f24;--muted:#57606a;--line:#d5dbe1;--soft:#f4f6f8;--link:#0b5cad;
--good:#14692f;--good-soft:#e5f5ea;--warn:#7a4d00;--warn-soft:#fff4d6;--bad:#b3261e;--bad-soft:#fdeceb;
--c0:#0b62a4;--c1:#d1495b;--c2:#2e8b57;--c3:#b86e00;--c4:#6a4c93;--c5:#00838f;--c6:#8d6e63;--c7:#5d6d7e;--c8:#ad1457;
--c9:#6f7f00}
@media (prefers-color-scheme:dark){:root{--paper:#14171b;--ink:#e6e9ec;--muted:#a3adb8;--line:#363d45;--soft:#1d2126;
--link:#7cbcf5;--good:#7fd69a;--good-soft:#16301f;--warn:#f0c674;--warn-soft:#362a10;--bad:#ff9d96;--bad-soft:#3d1b19;
--c0:#6cb6f2;--c1:#ff8f9c;--c2:#6fd49b;--c3:#f0ad4e;--c4:#b79ce0;--c5:#4dd0e1;--c6:#c8a99d;--c7:#a9b8c8;--c8:#f06ba2;
--c9:#c3d34f}}
*{box-sizing:border-box}
body{font:15px/1.5 system-ui,sans-serif;margin:0 auto;max-width:1150px;padding:1rem;background:var(--paper);
color:var(--ink);overflow-wrap:anywhere}
h1{font-size:clamp(1.3rem,5vw,1.7rem);line-height:1.2;margin:.6em 0 .2em}h2{font-size:1.25rem;margin:1.8em 0 .5em}
h3{font-size:1rem;margin:1.2em 0 .3em}a{color:var(--link)}p{max-width:75ch}
img{max-width:100%}.note,small{color:var(--muted);font-size:13px}
code,pre{font:13px/1.45 ui-monospace,monospace}
pre{background:var(--soft);padding:.8em 1em;overflow:auto;border-radius:6px}
.scroll{overflow-x:auto;max-width:100%}
table{border-collapse:collapse;font-size:14px}
td,th{padding:.35em .7em .35em 0;border-bottom:1px solid var(--line);text-align:left;vertical-align:top;
overflow-wrap:normal}
td:last-child{overflow-wrap:anywhere}
table.numbers td:nth-child(n+2),table.numbers th:nth-child(n+2){text-align:right;white-space:nowrap;padding-left:.7em}
table.numbers td:first-child,table.numbers th:first-child{min-width:8.5em;position:sticky;left:0;
background:var(--paper)}
details{margin:.6em 0}summary{cursor:pointer;font-weight:600}
.warning{background:var(--warn-soft);color:var(--warn);padding:.5em 1em;border-radius:6px;max-width:none}
.charts{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,420px),1fr));gap:1.2rem 2rem}
figure{margin:0}figure.chart{max-width:500px}figcaption{font-weight:600}
figure.chart>svg{width:100%;height:auto;font-family:system-ui,sans-serif;stroke-linejoin:round;display:block}
figure.chart .note{margin:.3em 0 0}
ul.legend{list-style:none;margin:.3em 0;padding:0;display:flex;flex-wrap:wrap;gap:.1em 1.1em;font-size:13px}
svg.key{width:26px;height:12px;margin-right:.4em;fill:none}
"""
