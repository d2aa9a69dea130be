# SPDX-License-Identifier: MIT
"""The objects of the library: each method is the function that it says, with the device or file filled in."""

from __future__ import annotations

import importlib
import inspect
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import vfio_mig
from tests.unit.made_up_protocol import MadeUp
from vfio_mig import library
from vfio_mig.device import Device as OpenDevice
from vfio_mig.host.devices import HostDevice
from vfio_mig.jobs.engine import session as sessions

if TYPE_CHECKING:
    from collections.abc import Callable

NAME = "gpu-1"
FOUND = HostDevice(NAME, "/sys/x", "mdev", "t", "gpu", "vfio_mdev", 7)
SETTINGS = vfio_mig.Settings(abi="gvt-rfc")
MEMORY = [vfio_mig.MemoryMap("m", 0)]
Call = tuple[tuple[Any, ...], dict[str, Any]]


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> library.Device:
    opened = OpenDevice(NAME, os.open("/dev/null", os.O_RDONLY))

    def open_session(name: str, settings: vfio_mig.Settings, **_: object) -> sessions.Session:
        assert (name, settings) == ("any name", SETTINGS)
        return sessions.Session(FOUND, opened, MadeUp(opened))

    monkeypatch.setattr(sessions, "open_session", open_session)
    return vfio_mig.Host(SETTINGS).open("any name")


def played(monkeypatch: pytest.MonkeyPatch, function: str) -> list[Call]:
    """Put something in a function's place that keeps what it is called with, as far as the function would take that."""
    real = getattr(vfio_mig, function)
    calls: list[Call] = []

    def play(*args: Any, **kwargs: Any) -> str:
        inspect.signature(real).bind(*args, **kwargs)
        calls.append((args, kwargs))
        return function

    monkeypatch.setattr(importlib.import_module(real.__module__), real.__name__, play)
    return calls


METHODS: dict[str, tuple[Callable[[library.Device], object], Call]] = {
    "device_info": (lambda one: one.info(), ((NAME,), {})),
    "device_status": (lambda one: one.status(), ((NAME,), {})),
    "device_state": (lambda one: one.state("stop"), ((NAME,), {"new": "stop"})),
    "stop_device": (lambda one: one.stop(), ((NAME,), {})),
    "start_device": (lambda one: one.start(force=True), ((NAME,), {"force": True})),
    "reset_device": (lambda one: one.reset(), ((NAME,), {"force": False})),
    "save": (lambda one: one.save(Path("a"), leave_running=True), ((NAME, "a"), {"leave_running": True})),
    "restore": (lambda one: one.restore("a", start=True), ((NAME, "a"), {"start": True})),
    "migrate": (lambda one: one.migrate("b", start=False), ((NAME, "b"), {"start": False})),
    "check_image": (lambda one: one.check(Path("a")), ((NAME, "a"), {"raw": False})),
    "sync_dirty": (
        lambda one: one.sync("a", memory=MEMORY, rounds=2),
        ((NAME, "a"), {"memory": MEMORY, "rounds": 2}),
    ),
    "fetch_dirty": (
        lambda one: one.dirty(list_ranges=True),
        ((NAME,), {"memory": (), "ranges": (), "list_ranges": True, "log_time": None}),
    ),
    "conform_device": (
        lambda one: one.conform(checks=["v2.arc"]),
        ((NAME,), {"checks": ["v2.arc"], "dangerous": False}),
    ),
}


@pytest.mark.parametrize("function", METHODS)
def test_a_method_is_its_function(monkeypatch: pytest.MonkeyPatch, device: library.Device, function: str) -> None:
    calls = played(monkeypatch, function)
    call, (args, kwargs) = METHODS[function]
    assert call(device) == function
    ((its, more),) = calls
    assert [one for one in its if one != SETTINGS] == list(args)
    assert SETTINGS in its
    assert more == kwargs


def test_every_function_of_a_device_is_a_method() -> None:
    without = {"hold_device", "hold_devices", "list_devices", "open_device"}
    without |= {"restore_all", "save_all", "start_devices", "stop_devices", "restore_vm", "save_vm"}
    of_devices = {
        name
        for name in vfio_mig.__all__
        if inspect.isfunction(one := getattr(vfio_mig, name)) and "settings" in inspect.signature(one).parameters
    }
    assert of_devices - without - {"examine_host", "load_pages", "report_host"} == METHODS.keys()


def test_steps_reach_who_asked_for_them(monkeypatch: pytest.MonkeyPatch, device: library.Device) -> None:
    calls = played(monkeypatch, "stop_device")
    seen: list[vfio_mig.Event] = []
    device.stop(on_event=seen.append)
    on_step = calls[0][0][1].on_step
    on_step("stop", "opened", NAME)
    assert seen == [vfio_mig.Event("stop", "opened", NAME)]


def test_a_sync_without_memory_is_refused_before_anything_is_done(device: library.Device) -> None:
    with pytest.raises(vfio_mig.UsageError, match="there is no guest memory to copy"):
        device.sync("a")


def test_a_device_says_what_it_is_and_closes_at_the_end_of_the_block(device: library.Device) -> None:
    with device as same:
        assert (same.name, same.protocol) == (NAME, "made-up")
        assert same.describe().startswith(f"{NAME}: ")
        opened = same._session.device
    with pytest.raises(ValueError, match="is closed"):
        opened.fileno()
    device.close()


@pytest.mark.parametrize(
    ("function", "call", "args"),
    [
        ("verify_image", lambda image: image.verify(), ("file",)),
        ("inspect_image", lambda image: image.inspect(), ("file",)),
        ("diff_images", lambda image: image.diff(vfio_mig.Image("other")), ("file", "other")),
        ("diff_images", lambda image: image.diff(Path("other")), ("file", "other")),
        ("extract_image", lambda image: image.extract(Path("into")), ("file", "into")),
        ("load_pages", lambda image: image.pages([]), ("file",)),
    ],
)
def test_an_image_s_methods_are_their_functions(
    monkeypatch: pytest.MonkeyPatch, function: str, call: Callable[[vfio_mig.Image], object], args: tuple[str, ...]
) -> None:
    calls = played(monkeypatch, function)
    assert call(vfio_mig.Image(Path("file"))) == function
    assert calls[0][0] == args


def test_what_is_asked_of_an_image_s_methods_reaches_their_functions(monkeypatch: pytest.MonkeyPatch) -> None:
    image = vfio_mig.Image("file")
    asked: dict[str, Any] = {"device": "one", "force": True}
    cases: dict[str, tuple[Callable[[], Any], Call]] = {
        "extract_device": (lambda: image.extract_device("new", **asked), (("file", "new"), asked)),
        "pack_stream": (
            lambda: image.pack_into(Path("vm"), "new", **asked),
            (("file", "new"), {"stream": "vm", **asked}),
        ),
    }
    for function, (call, expected) in cases.items():
        calls = played(monkeypatch, function)
        assert call() == function
        assert calls == [expected]


@pytest.mark.parametrize(
    ("function", "call", "args"),
    [
        ("list_devices", lambda one: one.devices(), ()),
        ("examine_host", lambda one: one.doctor(), (SETTINGS,)),
        ("mdev_types", lambda one: one.mdev_types(), ()),
        ("create_mdev", lambda one: one.create_mdev("t"), ("t",)),
        ("remove_mdev", lambda one: one.remove_mdev("u"), ("u",)),
    ],
)
def test_a_host_s_methods_are_their_functions(
    monkeypatch: pytest.MonkeyPatch, function: str, call: Callable[[vfio_mig.Host], object], args: tuple[object, ...]
) -> None:
    calls = played(monkeypatch, function)
    call(vfio_mig.Host(SETTINGS))
    assert calls[0][0] == args
