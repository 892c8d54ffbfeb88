"""bench/device_time.py: the host's time while a device is held, and the device's time alone."""

from contextlib import nullcontext

import pytest
import torch
from bench_modules import contestants, device_time

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
NAMES = ("linear", "lora-r16", "boft-2-8")
SHAPE = contestants.Shape(64, 32, 8)


class Held:
    """A device that is held for as many cycles as it is told, while a call of the host takes 3M."""

    def __init__(self, monkeypatch, cycles_of_a_call):
        self.cycles_of_a_call, self.slept, self.busy = cycles_of_a_call, [], 0
        monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: None)
        monkeypatch.setattr(torch.cuda, "_sleep", self.sleep)
        monkeypatch.setattr(torch.cuda, "Event", lambda: self)

    def sleep(self, cycles):
        self.slept.append(cycles)
        self.busy = cycles

    def record(self):
        pass

    def query(self):
        return self.busy <= 0

    def __call__(self):
        self.busy -= self.cycles_of_a_call


def test_the_device_is_held_longer_until_all_calls_are_enqueued(monkeypatch):
    run = Held(monkeypatch, 3 << 20)
    timer = device_time.HostTimer(CUDA)
    assert timer(run, 10) > 0
    assert run.slept == [1 << 22, 1 << 23, 1 << 24, 1 << 25]
    assert timer(run, 10) > 0
    assert run.slept[4:] == [1 << 25]  # it remembers


def test_a_call_that_waits_for_the_device_has_no_host_time(monkeypatch):
    run = Held(monkeypatch, 1 << 40)
    timer = device_time.HostTimer(CUDA)
    with pytest.raises(device_time.WaitsForDevice, match="2 calls waited for the device"):
        timer(run, 2)
    assert run.slept[-1] == device_time.MOST_CYCLES
    assert not timer.fits(run, 2)
    assert timer.fits(Held(monkeypatch, 1), 2)


def test_recorded_calls_take_turns():
    made = []
    run = device_time.Recorded([lambda: made.append(0), lambda: made.append(1)], CPU)
    run()
    assert (made, run.n_calls) == ([0, 1], 2)
    assert device_time.DeviceTimer(CPU)(run, 3) > 0
    assert made == [0, 1] * 4


class Streams:
    """Stands for torch.cuda: notes captures and replays, and makes every call at once."""

    def __init__(self, monkeypatch, log):
        self.log = log
        for name in ("current_stream", "CUDAGraph", "Event"):
            monkeypatch.setattr(torch.cuda, name, lambda *_, **__: self)
        monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
        monkeypatch.setattr(device_time, "_capture_stream", lambda: self)
        for name in ("synchronize", "_sleep"):
            monkeypatch.setattr(torch.cuda, name, lambda *_: None)

    def wait_stream(self, other):
        pass

    def capture_begin(self):
        self.log.append("begin")

    def capture_end(self):
        self.log.append("end")

    def replay(self):
        self.log.append("replay")

    def record(self):
        self.log.append("event")

    def elapsed_time(self, end):
        return 16.0  # milliseconds


def test_calls_are_captured_once_and_replayed(monkeypatch):
    log = []
    Streams(monkeypatch, log)
    sets = [lambda i=i: log.append(i) for i in range(3)]
    run = device_time.Recorded(sets, CUDA)
    assert log == [0, 1, 2, 0, 1, 2, "begin", *[0, 1, 2] * 3, "end"]
    assert run.n_calls == 9 >= device_time.MIN_CALLS
    log.clear()
    seconds = device_time.DeviceTimer(CUDA)(run, 2)
    assert log == ["event", "replay", "replay", "event"]
    assert seconds == pytest.approx(16e-3 / (2 * 9))


def test_a_capture_that_fails_is_told_from_a_call_that_fails(monkeypatch):
    log = []
    Streams(monkeypatch, log)

    def waits():
        if log:
            raise RuntimeError("operation not permitted when stream is capturing")

    with pytest.raises(device_time.CaptureFailed, match="RuntimeError: operation not permitted"):
        device_time.Recorded([waits], CUDA)

    def fails():
        raise ValueError("no kernel")

    with pytest.raises(ValueError, match="no kernel"):
        device_time.Recorded([fails], CUDA)


def test_steps_compute_all_gradients_of_each_batch():
    base = contestants.frozen(SHAPE, CPU, torch.float32)
    x, grad = contestants.batch(SHAPE, CPU, torch.float32)
    job = contestants.Job(contestants.build("boft-2-8", base), x, grad)
    sets = device_time.batches(x, grad, 3)
    steps = device_time.training_steps(job.entry, sets)
    job.both()
    kept = [x.grad, *[p.grad for p in job.entry.trainable()]]
    torch.testing.assert_close(steps[0](), tuple(kept))
    dx = [step()[0] for step in steps]
    assert not any(torch.equal(dx[0], other) for other in dx[1:])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_times_on_a_gpu():
    """A held device does not speed the host up, and a graph takes no less than its products."""
    shape = contestants.Shape(4096, 4096, 2048)
    base = contestants.frozen(shape, CUDA, torch.bfloat16)
    batch = contestants.batch(shape, CUDA, torch.bfloat16)
    jobs = [contestants.Job(contestants.build(name, base), *batch) for name in NAMES]
    sets = device_time.batches(*batch, device_time.SETS)
    steps = [device_time.training_steps(job.entry, sets) for job in jobs]
    timer = device_time.DeviceTimer(CUDA)
    linear, lora, _ = (timer(device_time.Recorded(step, CUDA), 1) for step in steps)
    floor = 4 * shape.d * shape.n * shape.tokens / 4e15  # two products at 4 PFLOP/s
    assert floor < linear < lora
    timer = device_time.HostTimer(CUDA)
    assert all(timer.fits(job.both, 1) for job in jobs)
    linear, lora, _ = (timer(job.both, device_time.HOST_CALLS) for job in jobs)
    assert 0 < linear < lora < 0.1
