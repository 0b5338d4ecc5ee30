import signal
import sys

from .cli import main

# Like Ctrl-C: the running part is ended too, and its results are kept.
signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
sys.exit(main(sys.argv[1:]))
