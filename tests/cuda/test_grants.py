"""A kernel asks for more shared memory once on each device, not at every launch."""

import shutil
import subprocess

import pytest

from boft_ops._runtime import paths

PROGRAM = r"""
#include <cstdio>
#include <thread>
#include <vector>

#include "once.h"

int main() {
  boft::cuda::Grants grants;
  int asked = 0, a = 0, b = 0;
  const auto ask = [&](int error) { return [&asked, error] { ++asked; return error; }; };
  const auto say = [&](int error) { std::printf("%d %d\n", error, asked); };
  say(grants.once(&a, 0, 100, ask(7)));  // refused: it is asked for again
  say(grants.once(&a, 0, 100, ask(0)));
  say(grants.once(&a, 0, 100, ask(7)));
  say(grants.once(&a, 0, 60, ask(7)));
  say(grants.once(&a, 0, 120, ask(0)));  // more than was granted
  say(grants.once(&a, 1, 100, ask(0)));  // another device
  say(grants.once(&b, 0, 100, ask(0)));  // another kernel
  std::vector<std::thread> threads;
  for (int i = 0; i < 4; ++i) threads.emplace_back([&] { grants.once(&b, 1, 100, ask(0)); });
  for (auto& thread : threads) thread.join();
  say(0);
}
"""


@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")
def test_shared_memory_is_asked_for_once(tmp_path):
    (tmp_path / "main.cpp").write_text(PROGRAM)
    command = ["g++", "-std=c++17", "-pthread", f"-I{paths.csrc() / 'cuda'}", "main.cpp", "-o", "a"]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    said = subprocess.run([tmp_path / "a"], check=True, capture_output=True, text=True).stdout
    assert said.split("\n")[:-1] == ["7 1", "0 2", "0 2", "0 2", "0 3", "0 4", "0 5", "0 6"]


def test_a_launch_asks_through_the_grants():
    """The emulation launches otherwise: here the text has to do."""
    source = (paths.csrc() / "cuda" / "gpu.cuh").read_text()
    assert source.count("cudaFuncSetAttribute") == 1
    assert source.index("grants.once(") < source.index("cudaFuncSetAttribute")
