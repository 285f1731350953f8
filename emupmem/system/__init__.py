"""The one impure package: every open, rename, lock and program of emupmem is here."""
