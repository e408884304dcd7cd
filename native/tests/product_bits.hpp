// Hashes of integer products, the same on every processor and instruction set: format, kind of rows, FNV-1a of the outputs'
// bytes in test_linear_int.cpp. After a deliberate change of the arithmetic or of that test's numbers, DSO_PRINT_BITS=1
// test_linear_int prints new ones.
#pragma once
#include <cstdint>

struct ProductBits {
  int format, kind;
  uint64_t hash;
};
constexpr ProductBits product_bits[] = {
    {2, 2, 0xb538e1d4557aa2de},   // int8
    {2, 3, 0x8918a763b441b8ec},   // int8
    {16, 2, 0x3f204ca37f18edef},  // int3
    {16, 3, 0x3713bb2bd31d03e4},  // int3
    {3, 2, 0x5a4c8bd3b9913c98},   // int4
    {3, 3, 0x7e5ab790e5c95197},   // int4
    {4, 2, 0xab0a8c84d80cfad1},   // q4_1
    {4, 3, 0xeed165b10fb0d4d3},   // q4_1
    {6, 2, 0xfb999817d4e6ca88},   // q2_k
    {6, 3, 0x0f0aa3a6fa274cd9},   // q2_k
    {7, 2, 0xf9005bda10f2c3de},   // q3_k
    {7, 3, 0x770fb425bd942b2d},   // q3_k
    {8, 2, 0xc691f3f493566464},   // q4_k
    {8, 3, 0x4a807511c1f6264d},   // q4_k
    {9, 2, 0xd3bdae99ad8fe93a},   // q5_k
    {9, 3, 0x9ab6e00a6e4dabc2},   // q5_k
    {10, 2, 0x51998e71c1218e35},  // q6_k
    {10, 3, 0xbebcd967ff07f029},  // q6_k
    {11, 2, 0x3f33f617ca3ad3ba},  // iq4_xs
    {11, 3, 0xf6ab0e001779a95c},  // iq4_xs
    {12, 2, 0x027c8d0074ecc11e},  // iq4_nl
    {12, 3, 0xf8810175f25ee8b0},  // iq4_nl
    {13, 2, 0xd3b10323b96c5ec5},  // q5_0
    {13, 3, 0x4907887cffba2f94},  // q5_0
    {14, 2, 0x92e096a92430a1c6},  // q5_1
    {14, 3, 0x91879ba41467f94b},  // q5_1
    {15, 2, 0x05ba7bd4f70f3352},  // mxfp4
    {15, 3, 0x9a24a8e457ce2d0f},  // mxfp4
};
