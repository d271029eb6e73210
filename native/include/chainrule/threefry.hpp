// The 20-round Threefry-2x32 block cipher: J. Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC11.
#pragma once

#include <cstdint>

namespace chainrule {

struct Words {
  std::uint32_t first, second;
};

inline Words threefry2x32(Words key, Words counter) {
  constexpr int kRotations[2][4] = {{13, 15, 26, 6}, {17, 29, 16, 24}};
  const std::uint32_t keys[3] = {key.first, key.second, key.first ^ key.second ^ 0x1BD11BDAu};
  std::uint32_t x = counter.first + keys[0];
  std::uint32_t y = counter.second + keys[1];
  for (std::uint32_t round = 0; round < 5; ++round) {
    for (const int rotation : kRotations[round % 2]) {
      x += y;
      y = ((y << rotation) | (y >> (32 - rotation))) ^ x;
    }
    x += keys[(round + 1) % 3];
    y += keys[(round + 2) % 3] + round + 1;
  }
  return {x, y};
}

}  // namespace chainrule
