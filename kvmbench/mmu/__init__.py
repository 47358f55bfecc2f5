"""Page tables: the guest's own, and what KVM makes of them."""
