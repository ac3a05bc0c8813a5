"""What a program's signal handlers raise reaches the program, wherever accel is at that moment."""

from __future__ import annotations

import children

# Each function is recorded, compiled and served while signals arrive at ever other moments.
PROGRAM = """
import traceback
fired = caught = wrong = strange = 0

class Late(Exception):
    pass

def handler(number, frame):
    global fired
    fired += 1
    raise Late(str(fired))

signal.signal(signal.SIGALRM, handler)
delay = 0.0001
end = time.monotonic() + 6
while time.monotonic() < end:
    scope = {}
    exec(compile("def g(x, l):\\n for v in l: x = x.relu() + v\\n return [x.sum()]", "g.py", "exec"), scope)
    g = accel.optimize(scope["g"])
    delay = 0.0001 + (delay * 1.37) % 0.004
    try:
        signal.setitimer(signal.ITIMER_REAL, delay)
        for _ in range(20):
            wrong += abs(g(x, [1.0, 2.0])[0] - (x.relu() + 1.0 + 2.0).sum()) > 1e-3
        time.sleep(0.02)
    except Late as error:
        caught += 1
        names = [entry.filename for entry in traceback.extract_tb(error.__traceback__)]
        if any("driver.py" in name or "recorder.py" in name for name in names):
            strange += 1
            traceback.print_exception(error)
    signal.setitimer(signal.ITIMER_REAL, 0)
print(json.dumps([fired, caught, int(wrong), strange, accel.counters()["recordings"]]))
"""


def test_no_exception_of_a_handler_is_lost() -> None:
    done = children.run(PROGRAM)
    assert done.code == 0, done.stderr
    assert "internal error" not in done.stderr, done.stderr
    fired, caught, wrong, strange, recordings = done.facts
    assert fired > 50
    assert recordings > 20
    # An object's finaliser may be running, in which Python itself drops it.
    assert fired - caught <= fired // 200 + done.stderr.count("Exception ignored"), done.stderr
    assert wrong == 0
    assert strange == 0, done.stderr
