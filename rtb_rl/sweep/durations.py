"""How long something takes, in words."""


def duration(seconds: float) -> str:
    """Such as 40 s, 3.5 min, 12 min, 3 h 20 min."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = seconds / 60
    if minutes < 10:
        return f"{minutes:.1f} min"
    whole = round(minutes)
    return f"{whole} min" if whole < 100 else f"{whole // 60} h {whole % 60:02} min"
