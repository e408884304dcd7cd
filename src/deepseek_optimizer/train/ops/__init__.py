"""The operations of training, one per file. CPU tensors in bf16 or fp32 use the native implementation; all others use a plain
torch implementation (`*_reference`), against which the native one is tested."""
