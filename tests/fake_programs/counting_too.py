"""The counting program under a second name."""

from fake_programs.counting import Settings, given, main

__all__ = ["Settings"]

if __name__ == "__main__":
    main(given())
