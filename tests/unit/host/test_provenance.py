"""Provenance: one line for people, JSON for files, and no times passed off as real ones."""

from __future__ import annotations

import json

import pytest

from kvmbench.errors import MisuseError
from kvmbench.host.provenance import Provenance


@pytest.fixture
def appliance() -> Provenance:
    return Provenance.now(
        "appliance",
        kernel="6.1.0-37-cloud-amd64",
        module="kvm_amd",
        parameters={"npt": "0"},
        emulator="QEMU 7.2.22 (TCG)",
    )


def test_the_line_names_host_kernel_module_and_emulator(appliance: Provenance) -> None:
    assert str(appliance) == (
        "appliance, Linux 6.1.0-37-cloud-amd64, kvm_amd npt=0, QEMU 7.2.22 (TCG): times are emulator time"
    )
    assert (
        str(Provenance(kind="local", kernel="6.1.0", module="kvm_intel")) == "local, Linux 6.1.0, kvm_intel"
    )
    assert str(Provenance()) == "host unknown"


def test_times_of_an_emulator_are_labelled(appliance: Provenance) -> None:
    assert appliance.is_emulated
    assert appliance.time_unit_note == "emulator time"
    assert Provenance(kind="local").time_unit_note == ""


def test_json_brings_everything_back(appliance: Provenance) -> None:
    assert Provenance.from_json(appliance.to_json()) == appliance
    assert appliance.versions["python"]
    assert appliance.created.endswith("+00:00")


def test_fields_of_a_later_version_are_dropped(appliance: Provenance) -> None:
    later = json.dumps({**json.loads(appliance.to_json()), "microcode": "0x1"})
    assert Provenance.from_json(later) == appliance


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not JSON"),
        ("[1]", "not a JSON object"),
        ('{"kernel": 6}', "'kernel' is 6, not text"),
        ('{"parameters": {"npt": 1}}', "not a table of text"),
        ('{"kind": "cloud"}', "'cloud' is none of local, appliance, ssh"),
    ],
)
def test_damaged_provenance_is_refused(text: str, message: str) -> None:
    with pytest.raises(MisuseError, match=message):
        Provenance.from_json(text)
