"""What all parts of a report share: text made safe, and the style sheet, whose colours charts.py draws in."""

from __future__ import annotations

import html


def printable(value: object) -> str:
    """A text without the control characters that a page may not hold."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in str(value))


def text(value: object) -> str:
    """A text, escaped for a page."""
    return html.escape(printable(value))


STYLE = """
:root {
  --paper: #ffffff; --card: #f5f6f8; --ink: #1d2330; --soft: #5b6474; --line: #d9dde4; --first: #1f6feb;
  --second: #d97a1d; --other: #a3abb8;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #14171d; --card: #1d2129; --ink: #e6e9ef; --soft: #9aa4b4; --line: #343b47; --first: #6ea8ff;
    --second: #f0a04b; --other: #5f6877;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0 auto; max-width: 60rem; padding: 1.5rem 1.25rem 4rem; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", "Noto Sans CJK SC", "Noto Sans SC",
    "PingFang SC", "Microsoft YaHei", sans-serif;
}
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0.5rem 0; }
h2 { font-size: 1.2rem; margin: 2.5rem 0 0.75rem; padding-bottom: 0.3rem; border-bottom: 1px solid var(--line); }
.about, .note, small, figcaption, cite { color: var(--soft); }
.about, .note { margin: 0.25rem 0 1rem; }
.note, small, figcaption { font-size: 0.875rem; }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(11rem, 1fr)); gap: 0.75rem; }
.card { background: var(--card); border-radius: 0.5rem; padding: 0.75rem 1rem; }
.card .name, .card .beside { font-size: 0.875rem; color: var(--soft); }
.card .value { font-size: 1.75rem; line-height: 1.25; font-weight: 600; font-variant-numeric: tabular-nums; }
.figures { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(20rem, 100%), 1fr)); gap: 1.25rem; }
figure { margin: 0; }
figcaption { font-weight: 600; margin-bottom: 0.25rem; }
svg { display: block; width: 100%; height: auto; }
svg text { font-family: inherit; }
.wide { overflow-x: auto; }
.wide svg { min-width: 44rem; }
table { border-collapse: collapse; }
th { text-align: left; font-weight: 600; }
.words { width: 100%; }
.words th, .words td, .stages th, .stages td {
  padding: 0.35rem 1rem 0.35rem 0; border-bottom: 1px solid var(--line); vertical-align: top;
}
.stages th { font-weight: 400; }
.stages tr:last-child th, .stages td { font-weight: 600; font-variant-numeric: tabular-nums; text-align: right; }
.stages tr:last-child th { text-align: left; }
.near { display: inline-block; margin-right: 0.9rem; }
.near small { margin-left: 0.3rem; font-variant-numeric: tabular-nums; }
.confusion { font-size: 0.875rem; }
.confusion th[scope="row"] { padding-right: 0.6rem; white-space: nowrap; }
.confusion th[scope="col"] { vertical-align: bottom; padding: 0.2rem; font-weight: 400; }
.confusion th[scope="col"] span { writing-mode: vertical-rl; transform: rotate(180deg); }
.confusion td { text-align: right; font-variant-numeric: tabular-nums; padding: 0.25rem 0.4rem; }
.confusion .count {
  min-width: 2.2rem; text-align: center; border: 1px solid var(--paper);
  background: color-mix(in srgb, var(--first) calc(var(--share) * 0.6), var(--card));
}
.confusion .score { padding-left: 0.8rem; color: var(--soft); text-align: right; }
blockquote { margin: 0 0 1rem; padding: 0.6rem 1rem; background: var(--card); border-radius: 0.5rem; }
blockquote p { margin: 0.2rem 0 0; white-space: pre-wrap; overflow-wrap: anywhere; }
cite { font-style: normal; font-size: 0.875rem; }
.kernel {
  display: grid; grid-template-columns: 17rem 1fr 4rem; gap: 0.25rem 1rem; align-items: center; padding: 0.5rem 0;
  border-bottom: 1px solid var(--line);
}
.kernel small { display: block; }
.bar { display: flex; align-items: center; gap: 0.5rem; height: 1.15rem; padding-right: 5rem; }
.bar i { height: 0.7rem; min-width: 2px; border-radius: 2px; flex: none; }
.bar span { font-size: 0.8rem; white-space: nowrap; color: var(--soft); font-variant-numeric: tabular-nums; }
.ours i, i.ours { background: var(--first); }
.theirs i, i.theirs { background: var(--other); }
.ratio { font-weight: 600; text-align: right; font-variant-numeric: tabular-nums; }
.key { white-space: nowrap; margin-left: 0.75rem; }
.key i { display: inline-block; width: 0.75rem; height: 0.75rem; border-radius: 2px; margin-right: 0.3rem; }
dl { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(26rem, 100%), 1fr)); gap: 0 1.5rem; margin: 0; }
dl div { display: flex; gap: 0.75rem; padding: 0.2rem 0; font-size: 0.9375rem; border-bottom: 1px solid var(--line); }
dt { color: var(--soft); flex: 0 0 8rem; }
dd { margin: 0; overflow-wrap: anywhere; }
@media (max-width: 40rem) {
  body { padding: 0.75rem 1rem 3rem; }
  .kernel { grid-template-columns: 1fr 4rem; }
  .kernel > div:first-child { grid-column: 1 / -1; }
  dt { flex-basis: 6rem; }
}
@media print {
  * { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
  body { max-width: none; padding: 0; font-size: 11pt; }
  figure, .card, .kernel, blockquote, tr, dl div { break-inside: avoid; }
  h2 { break-after: avoid; }
  .wide { overflow: visible; }
  .wide svg { min-width: 0; }
}
"""
