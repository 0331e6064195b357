"""Signals: caught between install and uninstall, and given back."""

import os
import signal
import threading

import pytest

from fbpc_ray.core.config import Config
from fbpc_ray.core.signals import Interrupted, Interruption, deferred_interrupt
from fbpc_ray.execution import backends
from fbpc_ray.execution.backends import open_backend


def handlers():
    return [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]


def test_a_backend_gives_the_signal_handlers_back():
    """Also when its block fails."""
    before, inside = handlers(), []
    with open_backend(Config().updated(backend="serial", device="cpu"), Interruption(), print):
        inside = handlers()
    assert handlers() == before
    assert not set(inside) & set(before)
    with (
        pytest.raises(ZeroDivisionError),
        open_backend(Config().updated(backend="serial", device="cpu"), Interruption(), print),
    ):
        raise ZeroDivisionError
    assert handlers() == before


def test_a_signal_is_a_flag_until_it_is_checked(capsys):
    interruption = Interruption()
    interruption.install()
    try:
        signal.alarm(100)  # as Ray's handlers do, which would end this process
        os.kill(os.getpid(), signal.SIGTERM)
        assert signal.alarm(0) == 0
        assert interruption.number == signal.SIGTERM
        assert "Stopping after this step" in capsys.readouterr().err
        with pytest.raises(Interrupted) as caught:
            interruption.check()
        assert caught.value.code == 128 + signal.SIGTERM
        with pytest.raises(Interrupted), interruption.at_once():
            raise AssertionError("not reached: the signal came before the block")
    finally:
        interruption.uninstall()


def test_installed_twice_the_first_handlers_come_back():
    before, interruption = handlers(), Interruption()
    interruption.install()
    interruption.install()
    interruption.uninstall()
    assert handlers() == before


def test_a_ctrl_c_is_deferred_to_the_end_of_the_block(capsys):
    before, reached = signal.getsignal(signal.SIGINT), []
    with pytest.raises(KeyboardInterrupt), deferred_interrupt("Stopping soon"):
        os.kill(os.getpid(), signal.SIGINT)
        reached.append("the end")
    assert capsys.readouterr().err == "\nStopping soon (again to stop at once) ...\n"
    assert reached == ["the end"]
    assert signal.getsignal(signal.SIGINT) is before


def test_a_second_ctrl_c_takes_effect_at_once():
    with pytest.raises(KeyboardInterrupt), deferred_interrupt():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        raise AssertionError("not reached")


def test_a_second_ctrl_c_is_not_raised_again_after_the_block():
    """Also of a handler that returns, unlike Python's own."""
    caught = []
    before = signal.signal(signal.SIGINT, lambda number, frame: caught.append(number))
    try:
        with deferred_interrupt():
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
        assert caught == [signal.SIGINT]
    finally:
        signal.signal(signal.SIGINT, before)


def test_an_ignored_ctrl_c_stays_ignored_and_a_thread_changes_nothing():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with deferred_interrupt():
            assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
            os.kill(os.getpid(), signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)
    handlers_seen = []

    def run() -> None:
        with deferred_interrupt():
            handlers_seen.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert handlers_seen == [before]


def test_a_backend_that_was_opened_during_a_ctrl_c_is_closed(monkeypatch):
    """The signal arrives while the backend starts: it starts, the block isn't entered, and it is closed."""
    events, before = [], handlers()

    class Backend:
        def close(self) -> None:
            events.append("closed")

    def start(*arguments) -> Backend:
        os.kill(os.getpid(), signal.SIGINT)
        events.append("started")
        return Backend()

    monkeypatch.setattr(backends, "_backend", start)
    with pytest.raises(KeyboardInterrupt), open_backend(Config(), Interruption(), print):
        events.append("entered")
    assert events == ["started", "closed"]
    assert handlers() == before
