"""Operations that have a form of their own on each platform, chosen when a program is lowered for it."""
