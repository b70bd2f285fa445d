"""What `import llava` finds from outside a clone that is called llava: the folder, and not the module in it."""

from pathlib import Path

if __name__ == "llava":
    raise ImportError(
        f"{Path(__file__).parent} is the clone; the module llava is in it. Run this in the clone, or put its path in "
        f"front before you import: sys.path.insert(0, {str(Path(__file__).parent)!r})"
    )
