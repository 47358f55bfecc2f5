"""What all panels' modules share in a page, as a widget: sent once, whatever the number of panels."""

from __future__ import annotations

from typing import ClassVar

import anywidget

from kvmbench_widgets import modules


class Library(anywidget.AnyWidget):
    """The shared ES modules and the shared style sheet. It shows nothing."""

    _esm = modules.library()
    _css = modules.css("panel")

    _made: ClassVar[Library | None] = None

    @classmethod
    def reference(cls) -> str:
        """What a panel's module takes to ask for it; made at the first call, and anew once it was closed."""
        if cls._made is None or cls._made.comm is None:
            cls._made = cls()
        return f"anywidget:{cls._made.model_id}"
