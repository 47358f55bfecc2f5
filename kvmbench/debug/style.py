"""The look of every HTML repr: one small style sheet and the two ways to mark text.

Colours are mixed into the text's own colour, so they stay readable on a light
and on a dark page without knowing which it is; the hues are blue and vermilion,
which all common forms of colour-blindness tell apart, and nothing is said by
colour alone: what changed is bold and underlined, the current row has an arrow.
"""

from __future__ import annotations

import html

# The class stands three times in the rules for tables: notebook pages bring rules of their own (numbers to the
# right, striped rows) that are more specific than one class and come later.
# JupyterLab's variables first, then what any page has. Its *-color3 are unreadable in the dark theme.
_SHEET = """
.kb { font-family: var(--jp-code-font-family, ui-monospace, Menlo, Consolas, monospace);
      font-size: var(--jp-code-font-size, 13px); line-height: 1.45;
      color: var(--jp-content-font-color1, inherit); overflow-x: auto; }
.kb.kb.kb table { border-collapse: collapse; margin: 0; font: inherit; color: inherit; border: 0; }
.kb.kb.kb tr, .kb.kb.kb tr:hover { background: transparent; }
.kb.kb.kb td, .kb.kb.kb th { padding: 0 .9em 0 0; text-align: left; white-space: pre; border: 0;
                 font-weight: normal; vertical-align: baseline; max-width: none; color: inherit; }
.kb .kb-dim { opacity: .72; }
.kb .kb-name { color: color-mix(in srgb, var(--jp-info-color1, #0072b2) 55%, currentColor); }
.kb .kb-changed { font-weight: bold; text-decoration: underline;
                  color: color-mix(in srgb, var(--jp-warn-color1, #d55e00) 60%, currentColor); }
.kb.kb.kb tr.kb-here { font-weight: bold;
                  background: color-mix(in srgb, currentColor 10%, transparent); }
.kb.kb.kb tr.kb-here td { font-weight: bold; }
.kb .kb-break { color: color-mix(in srgb, var(--jp-error-color1, #d55e00) 70%, currentColor); }
"""


def page(body: str) -> str:
    """Wraps a body in the element that the style sheet applies to, style sheet included."""
    return f"<div class='kb'><style>{_SHEET}</style>{body}</div>"


def span(text: str, kind: str, *, title: str = "") -> str:
    """Escaped text in class ``kb-<kind>``, with an optional tooltip."""
    tip = f' title="{html.escape(title, quote=True)}"' if title else ""
    return f"<span class='kb-{kind}'{tip}>{html.escape(text)}</span>"
