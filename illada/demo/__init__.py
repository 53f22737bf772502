"""The web page: chat, fill and revise in the browser, with the denoising shown token by token."""
