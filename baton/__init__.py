"""What every Baton process agrees on: requests, errors, configuration, frames and the stage ledger."""

__version__ = "0.1.0"
