import signal
import sys

from .cli import main

# As Ctrl-C does: the part under way is ended with us, and what it found is kept.
signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
sys.exit(main(sys.argv[1:]))
