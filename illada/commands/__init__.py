"""The `illada` command: one file per command, the options that they share, the conversation, the live view."""
