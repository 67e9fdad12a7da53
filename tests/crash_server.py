"""Runs the command line in forked children that end at chosen moments: one import of torch for hundreds of deaths.

`python crash_server.py random|kill|full FOLDER N key=value ...` prints JSON; N: how many seeds, or every N-th step.
"""

import contextlib
import errno
import io
import json
import os
import random
import select
import shutil
import signal
import sys
import time

import evodiff.commands  # noqa: F401  what the children would import

WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT


def command(folder, arguments):
    """In a child: the exit code, and what was said on standard error."""
    from evodiff.cli import main

    os.environ["EVODIFF_RESULTS"] = str(folder)
    said = io.StringIO()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(said):
        code = main(["run", *arguments])
    return code, said.getvalue()


def child(folder, arguments, prepare=lambda: None):
    """Fork; returns (process id, pipe that has [exit code, standard error, what `prepare` returned] at its end)."""
    out, into = os.pipe()
    pid = os.fork()
    if pid:
        os.close(into)
        return pid, out
    os.close(out)
    told = prepare()
    try:
        answer = [*command(folder, arguments), told]
    except BaseException as e:
        answer = [-1, f"{type(e).__name__}: {e}", told]
    os.write(into, json.dumps(answer).encode())
    os._exit(0)


def answer_of(pid, out):
    """[exit code, standard error], or None if the child died."""
    with os.fdopen(out) as pipe:
        text = pipe.read()
    os.waitpid(pid, 0)
    return json.loads(text) if text else None


def at_random(folder, arguments, seeds):
    """SIGKILL at random moments until a run survives, once it was killed: the number of kills, for each seed."""
    started = time.monotonic()
    whole = answer_of(*child(f"{folder}/whole", arguments))
    assert whole[0] == 0, whole
    duration = time.monotonic() - started
    kills = []
    for seed in range(seeds):
        rng, n = random.Random(seed), 0
        while True:
            pid, out = child(f"{folder}/{seed}", arguments)
            if not select.select([out], [], [], rng.uniform(0.0, duration))[0]:
                os.kill(pid, signal.SIGKILL)
            answer = answer_of(pid, out)
            if answer is None:
                n += 1
                continue
            assert answer[0] == 0, answer
            if n:
                break
            shutil.rmtree(f"{folder}/{seed}")
        kills.append(n)
    return kills


def at_every_step(folder, arguments, events, die, stride):
    """End a run at its first change of a file, at the one `stride` later, ... and go on with it each time.

    Returns what the first attempts answered: None where they died.
    """
    answers = []
    while True:
        n = len(answers)
        answer = answer_of(*child(f"{folder}/{n}", arguments, lambda n=n: at_change(n * stride, events, die)))
        if answer is not None and not answer[2]:
            return answers
        answers.append(answer and answer[:2])
        again = answer_of(*child(f"{folder}/{n}", arguments))
        assert again[0] == 0, (n, again)


def at_change(n, events, die):
    """Call `die` before the n-th change of a file among the results. Returns a list that is not empty from then on."""
    seen, done = 0, []

    def hook(event, args):
        nonlocal seen
        writes = event == "open" and isinstance(args[0], str | os.PathLike) and args[2] & WRITING
        if (writes or event in events) and "/runs" in os.fspath(args[0]):
            seen += 1
            if seen == n + 1:
                done.append(event)
                die()

    sys.addaudithook(hook)
    return done


def kill():
    os.kill(os.getpid(), signal.SIGKILL)


def full():
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


if __name__ == "__main__":
    mode, folder, number, *arguments = sys.argv[1:]
    if mode == "random":
        found = at_random(folder, arguments, int(number))
    elif mode == "kill":
        found = at_every_step(folder, arguments, ("os.rename", "os.remove", "os.mkdir"), kill, int(number))
    else:  # removing needs no room
        found = at_every_step(folder, arguments, ("os.rename", "os.mkdir"), full, int(number))
    print(json.dumps(found))
