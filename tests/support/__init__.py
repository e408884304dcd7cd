"""What several tests share: small random models of every family, and driving plans over sequences. Downloads nothing."""
