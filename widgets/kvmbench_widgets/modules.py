"""The front end's ES modules, joined into the texts that anywidget hands to a page.

anywidget gives the page one module a widget, loaded from a blob, and a blob can
import nothing beside it. So what all panels use (`SHARED`, and panel.css) travels once, as
the module of a widget of its own (`kvmbench_widgets.library`), and a panel's
module asks the page for it when it is first drawn; what only one panel uses is put into
that panel's module, in a scope of its own. No build step and no node: what is edited is what runs.

The modules keep to two forms, which `tests/unit/widgets/test_modules.py` holds them to:
``import { a, b } from "./name.js";`` and ``export`` before a function, const or class.
"""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

_FOLDER = Path(__file__).parent
_IMPORT = re.compile(r'^import \{ ([\w, ]+) \} from "\./(\w+)\.js";$', re.MULTILINE)
_EXPORT = re.compile(r"^export (?=(?:async )?(?:function|const|class) (\w+))", re.MULTILINE)
# Comments of their own line, and indentation: a third of the bytes. No module has a template literal over lines.
_BARE = re.compile(r"^\s*(?://.*\n|\n)|^[ ]+", re.MULTILINE)


#: The modules that every panel may use, each after those it imports.
SHARED = ("element", "panel", "rows")

# A panel: its modules run once, when the library is there, and leave `render`.
_PANEL = """\
let loading;
const load = async ({{ host, model }}) => {{
const $library = (await host.getWidget(model.get("library"))).exports;
{shared}
{body}
return render;
}};
export default {{
async render(context) {{
loading ??= load(context).catch((error) => {{ loading = undefined; throw error; }});
return (await loading)(context);
}},
}};
"""


@cache
def library() -> str:
    """The shared modules, as one ES module whose ``initialize`` hands them out."""
    return (
        "".join(_scoped(name) for name in SHARED)
        + f"export default {{ initialize: () => ({{ {', '.join(f'${name}' for name in SHARED)} }}) }};\n"
    )


@cache
def esm(name: str) -> str:
    """The panel `name` with all it imports except what is shared, as one ES module."""
    order: list[str] = []
    _visit(name, order, ())
    own = "".join(_scoped(each) for each in order[:-1] if each not in SHARED)
    text = own + _EXPORT.sub("", _imports(_read(name))).replace("export default { render };\n", "")
    shared = f"const {{ {', '.join(f'${each}' for each in SHARED)} }} = $library;"
    return _PANEL.format(shared=shared, body=text)


@cache
def css(name: str) -> str:
    """The style sheet `name`, or nothing if there is none."""
    path = _FOLDER / f"{name}.css"
    return re.sub(r"\s*\n\s*", "\n", path.read_text()) if path.exists() else ""


def _visit(name: str, order: list[str], above: tuple[str, ...]) -> None:
    if name in above:
        raise ImportError(f"modules import each other: {' -> '.join([*above, name])}")
    for match in _IMPORT.finditer(_read(name)):
        if match[2] not in order:
            _visit(match[2], order, (*above, name))
    order.append(name)


def _read(name: str) -> str:
    return _BARE.sub("", (_FOLDER / f"{name}.js").read_text())


def _imports(text: str) -> str:
    return _IMPORT.sub(lambda match: f"const {{ {match[1]} }} = ${match[2]};", text)


def _scoped(name: str) -> str:
    text = _read(name)
    exported = ", ".join(match[1] for match in _EXPORT.finditer(text))
    return f"const ${name} = (() => {{\n{_EXPORT.sub('', _imports(text))}return {{ {exported} }};\n}})();\n"
