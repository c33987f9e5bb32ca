"""A run that streams in chunks so small that several processes have many each."""

from train_loop import main
from train_loop.data import sources

sources.CHUNK_BYTES = 500
main.leave(main.main())
