"""Edits with which sums between hosts send the exponents of floats in 3 bits each, without loss."""

from __future__ import annotations

from hvdlm_horovod.edit import Edit

# Gradients of one matrix have few exponents. Loops over all elements are without branches, and compilers make vector
# instructions of them: by sequences of 8 elements, with branches, they took twice as long.
_CODING = "Exponents of floats are coded on slow networks: gradients take 0.85 to 0.9 of their bytes."
EDITS: tuple[Edit, ...] = (
    Edit(
        "horovod/common/ops/mpi_operations.cc",
        "MPIAllreduce::MPIAllreduce(HorovodGlobalState* global_state)\n",
        """\
#if defined(__GNUC__) && !defined(__clang__)
#define HVDLM_VECTORIZED __attribute__((optimize("O3")))
#else
#define HVDLM_VECTORIZED
#endif

namespace {

const int kMostCoded = 16384; // elements

// Packs 3 bits of each of 8 bytes into 3 bytes.
HVDLM_VECTORIZED void Pack(const uint8_t* __restrict bytes, int groups, uint8_t* __restrict target) {
  for (int g = 0; g < groups; ++g) {
    uint64_t x;
    std::memcpy(&x, bytes + 8 * g, 8);
    x = (x | x >> 5) & 0x003f003f003f003full;
    x = (x | x >> 10) & 0x00000fff00000fffull;
    x = x | x >> 20;
    target[3 * g] = uint8_t(x);
    target[3 * g + 1] = uint8_t(x >> 8);
    target[3 * g + 2] = uint8_t(x >> 16);
  }
}

HVDLM_VECTORIZED void Unpack(const uint8_t* __restrict source, int groups, uint8_t* __restrict bytes) {
  for (int g = 0; g < groups; ++g) {
    uint64_t x = source[3 * g] | uint64_t(source[3 * g + 1]) << 8 | uint64_t(source[3 * g + 2]) << 16;
    x = (x | x << 20) & 0x00000fff00000fffull;
    x = (x | x << 10) & 0x003f003f003f003full;
    x = (x | x << 5) & 0x0707070707070707ull;
    std::memcpy(bytes + 8 * g, &x, 8);
  }
}

// Codes the exponents of n floats, at most kMostCoded, in 3 bits each: 0 to 6 stand for the seven consecutive exponents
// that are the most frequent ones together in a sample, 7 for a byte at the end. Layout: the smallest of the seven; the
// low bytes of signs and fractions, first those of all elements that are least significant; the 3 bits of these that
// are left (float16); the codes; the bytes of other exponents.
template <typename Word, int Shift, int Bits> struct Code {
  static const int kRest = 8 * sizeof(Word) - Bits;
  static const int kLow = kRest / 8;
  static const uint32_t kExponent = (1u << Bits) - 1;
  static const uint32_t kFraction = (1u << Shift) - 1;
  static_assert(kRest % 8 == 0 || kRest % 8 == 3, "signs and fractions are stored in bytes and groups of 3 bits");

  static uint8_t codes[kMostCoded + 8], left[kMostCoded + 8];

  static int Packed(int n) { return (n + 7) / 8 * 3; }

  static uint32_t Smallest(const Word* words, int n) {
    int counts[(1 << Bits) + 7] = {0};
    for (int i = 0; i < n; i += 8) {
      ++counts[(words[i] >> Shift) & kExponent];
    }
    int sum = 0, smallest = 0, covered = 0;
    for (int last = 0; last <= int(kExponent); ++last) {
      sum += counts[last] - (last >= 7 ? counts[last - 7] : 0);
      if (sum > covered) {
        covered = sum;
        smallest = std::max(0, last - 6);
      }
    }
    return smallest;
  }

  HVDLM_VECTORIZED static void Split(const Word* __restrict words, int n, uint32_t base, uint8_t* __restrict low,
                                     uint8_t* __restrict code, uint8_t* __restrict rest) {
    for (int i = 0; i < n; ++i) {
      uint32_t above = ((uint32_t(words[i]) >> Shift) & kExponent) - base;
      code[i] = uint8_t(above < 7 ? above : 7);
    }
    for (int b = 0; b < kLow; ++b) {
      for (int i = 0; i < n; ++i) {
        uint32_t word = words[i];
        low[b * n + i] = uint8_t((word >> (Shift + Bits) << Shift | (word & kFraction)) >> 8 * b);
      }
    }
    for (int i = 0; kRest % 8 && i < n; ++i) {
      uint32_t word = words[i];
      rest[i] = uint8_t((word >> (Shift + Bits) << Shift | (word & kFraction)) >> 8 * kLow);
    }
  }

  HVDLM_VECTORIZED static void Join(const uint8_t* __restrict low, const uint8_t* __restrict code,
                                    const uint8_t* __restrict rest, int n, uint32_t base, Word* __restrict words) {
    for (int i = 0; i < n; ++i) {
      uint32_t value = kRest % 8 ? uint32_t(rest[i]) << 8 * kLow : 0;
      for (int b = 0; b < kLow; ++b) {
        value |= uint32_t(low[b * n + i]) << 8 * b;
      }
      uint32_t exponent = (base + code[i]) & kExponent; // code 7, which stands for another one, may be too large
      words[i] = Word(value >> Shift << (Shift + Bits) | exponent << Shift | (value & kFraction));
    }
  }

  // Calls function(i) for the elements of code 7, in their order, until it returns false; returns whether none did.
  template <typename Function> static bool Others(int n, Function function) {
    for (int first = 0; first < n; first += 8) {
      uint64_t x;
      std::memcpy(&x, codes + first, 8);
      if ((x & x >> 1 & x >> 2 & 0x0101010101010101ull) == 0) {
        continue;
      }
      for (int i = first; i < std::min(n, first + 8); ++i) {
        if (codes[i] == 7 && !function(i)) {
          return false;
        }
      }
    }
    return true;
  }

  // Returns the bytes written to target, 0 where coding saves nothing.
  static int64_t Encode(const char* source, int n, char* target) {
    auto* words = reinterpret_cast<const Word*>(source);
    auto* begin = reinterpret_cast<uint8_t*>(target);
    const uint8_t* end = begin + int64_t(n) * sizeof(Word);
    uint8_t* low = begin + 1;
    uint8_t* high = low + int64_t(n) * kLow;
    uint8_t* packed = high + (kRest % 8 ? Packed(n) : 0);
    uint8_t* others = packed + Packed(n);
    if (others >= end) {
      return 0;
    }
    const uint32_t base = Smallest(words, n);
    *begin = uint8_t(base);
    Split(words, n, base, low, codes, left);
    std::memset(codes + n, 0, 8);
    std::memset(left + n, 0, 8);
    Pack(codes, (n + 7) / 8, packed);
    if (kRest % 8) {
      Pack(left, (n + 7) / 8, high);
    }
    bool shorter = Others(n, [&](int i) {
      *others++ = uint8_t((words[i] >> Shift) & kExponent);
      return others < end;
    });
    return shorter ? others - begin : 0;
  }

  static void Decode(const char* source, int n, char* target) {
    auto* words = reinterpret_cast<Word*>(target);
    auto* low = reinterpret_cast<const uint8_t*>(source);
    const uint32_t base = *low++;
    const uint8_t* high = low + int64_t(n) * kLow;
    const uint8_t* packed = high + (kRest % 8 ? Packed(n) : 0);
    const uint8_t* others = packed + Packed(n);
    Unpack(packed, (n + 7) / 8, codes);
    if (kRest % 8) {
      Unpack(high, (n + 7) / 8, left);
    }
    Join(low, codes, left, n, base, words);
    Others(n, [&](int i) {
      words[i] = Word((words[i] & ~(kExponent << Shift)) | uint32_t(*others++) << Shift);
      return true;
    });
  }
};

template <typename Word, int Shift, int Bits> uint8_t Code<Word, Shift, Bits>::codes[kMostCoded + 8];
template <typename Word, int Shift, int Bits> uint8_t Code<Word, Shift, Bits>::left[kMostCoded + 8];

typedef Code<uint32_t, 23, 8> Float32Code;
typedef Code<uint16_t, 10, 5> Float16Code;
typedef Code<uint16_t, 7, 8> BFloat16Code;

int64_t Encode(DataType dtype, const char* source, int n, char* target) {
  return dtype == HOROVOD_FLOAT32   ? Float32Code::Encode(source, n, target)
         : dtype == HOROVOD_FLOAT16 ? Float16Code::Encode(source, n, target)
                                    : BFloat16Code::Encode(source, n, target);
}

void Decode(DataType dtype, const char* source, int n, char* target) {
  if (dtype == HOROVOD_FLOAT32) {
    Float32Code::Decode(source, n, target);
  } else if (dtype == HOROVOD_FLOAT16) {
    Float16Code::Decode(source, n, target);
  } else {
    BFloat16Code::Decode(source, n, target);
  }
}

} // namespace

MPIAllreduce::MPIAllreduce(HorovodGlobalState* global_state)
""",
        _CODING,
    ),
)
