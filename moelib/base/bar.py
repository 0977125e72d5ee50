"""Progress bars. tqdm's own lock is one between processes, for which Python starts another from 3.14 on: none is needed
here, and nothing should run beside a measurement that has no part in it."""

import threading

from tqdm import tqdm

tqdm.set_lock(threading.RLock())
