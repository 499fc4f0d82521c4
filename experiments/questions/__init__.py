"""Questions about documents whose caches were compressed before anybody asked."""
