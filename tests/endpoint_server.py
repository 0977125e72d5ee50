"""xllamacpp's server for a test: `python endpoint_server.py FILE.gguf` says its address and serves until it is ended.

Of the servers on the package registry it is the one that comes as a wheel: nothing is built, and it is 34 MB. It has
llama.cpp's own interface in a Python process, so its program, log and command line are none that moelib knows.
"""

import sys
import threading

import xllamacpp

parameters = xllamacpp.CommonParams()
parameters.model.path = sys.argv[1]
parameters.n_ctx, parameters.n_parallel, parameters.cpuparams.n_threads = 4096, 1, 2
server = xllamacpp.Server(parameters)
print("address", server.listening_address, flush=True)
threading.Event().wait()
