"""Reading what numpy saved as ``.npz``, of which nothing is believed: recordings and traces."""

from __future__ import annotations

import tokenize
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvmbench.errors import LoadError, MisuseError

# What numpy, zipfile and json raise beside their own errors. A file without zip's signature is taken for a pickle
# and refused with ValueError; a damaged header can claim any size, encryption, or odd compression, and numpy hands old
# ones to Python's tokenizer. JSON has infinite numbers.
_DAMAGE = (
    ValueError,
    KeyError,
    TypeError,
    AttributeError,
    SyntaxError,
    MemoryError,
    NotImplementedError,
    RuntimeError,
    ArithmeticError,
    tokenize.TokenError,
    MisuseError,
)


@contextmanager
def reading(path: Path, what: str, *, members: tuple[str, ...]) -> Iterator[Mapping[str, NDArray[Any]]]:
    """The arrays of a file by name, for a ``with`` that makes something of them.

    Args:
        path: the file.
        what: it should be, for messages: "recording".
        members: arrays it has to have.

    Raises:
        LoadError: another file, or a damaged one; also for what goes wrong inside the ``with``.
        OSError: it cannot be opened.
    """
    with path.open("rb") as file:
        try:
            loaded = np.load(file, allow_pickle=False)
            if not isinstance(loaded, np.lib.npyio.NpzFile):
                raise LoadError(f"{path}: a single numpy array, not a {what}")
            with loaded as archive:
                missing = set(members) - set(archive.files)
                if missing:
                    raise LoadError(f"{path}: not a {what}: it has no {', '.join(sorted(missing))}")
                yield archive
        except LoadError:
            raise
        except (zipfile.BadZipFile, zlib.error, EOFError, OSError) as error:
            raise LoadError(f"{path}: a truncated or damaged {what} ({error})") from None
        except _DAMAGE as error:
            raise LoadError(f"{path}: not a {what} that kvmbench saved, or a damaged one ({error})") from None
