"""What training needs of Transformers' internals: the steps of its Trainer, and facts about its modules."""
