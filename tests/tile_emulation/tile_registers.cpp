// AMX's tile registers on a processor without them: preloaded, it takes the signal that each of
// their instructions raises there, does what the instruction would have done, and goes on after it.
//
// What Intel's manual has raise a fault (tiles that do not fit each other, a register that is not
// configured) ends the process with a message, so that a test which passes here would not fault.
#include <signal.h>
#include <ucontext.h>
#include <unistd.h>

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>

namespace {

constexpr int kTiles = 8, kMostRows = 16, kMostBytes = 64, kPalette = 1;

struct Tile {
  int rows = 0, bytes = 0;
  alignas(64) uint8_t data[kMostRows][kMostBytes] = {};
};

thread_local bool configured = false;
thread_local Tile tiles[kTiles];

[[noreturn]] void fail(const char* message) {
  const char prefix[] = "tile registers: ";
  [[maybe_unused]] auto written = write(STDERR_FILENO, prefix, sizeof prefix - 1);
  written = write(STDERR_FILENO, message, std::strlen(message));
  written = write(STDERR_FILENO, "\n", 1);
  std::abort();
}

Tile& tile_of(int index) {
  if (!configured || index >= kTiles || tiles[index].rows == 0) fail("not configured");
  return tiles[index];
}

void configure(const uint8_t* config) {
  if (config[0] != kPalette || config[1] != 0) fail("another palette or start row than 1 and 0");
  for (int i = 0; i < kTiles; ++i) {
    uint16_t bytes = 0;
    std::memcpy(&bytes, config + 16 + 2 * i, sizeof bytes);
    const int rows = config[48 + i];
    if (rows > kMostRows || bytes > kMostBytes || (rows == 0) != (bytes == 0)) fail("no such size");
    tiles[i] = Tile{rows, bytes, {}};
  }
  configured = true;
}

void load(Tile& tile, const uint8_t* from, int64_t stride) {
  std::memset(tile.data, 0, sizeof tile.data);
  for (int r = 0; r < tile.rows; ++r) std::memcpy(tile.data[r], from + r * stride, tile.bytes);
}

void store(const Tile& tile, uint8_t* to, int64_t stride) {
  for (int r = 0; r < tile.rows; ++r) std::memcpy(to + r * stride, tile.data[r], tile.bytes);
}

// A bfloat16, by its place in a row; numbers below the normal ones count as nought.
float widened(const uint8_t* row, int place) {
  uint16_t half = 0;
  std::memcpy(&half, row + 2 * place, sizeof half);
  if ((half & 0x7f80) == 0) half &= 0x8000;
  const uint32_t word = static_cast<uint32_t>(half) << 16;
  float value = 0;
  std::memcpy(&value, &word, sizeof value);
  return value;
}

void multiply(Tile& sums, const Tile& left, const Tile& right) {
  if (sums.rows != left.rows || sums.bytes != right.bytes || left.bytes != 4 * right.rows) {
    fail("sizes that do not fit");
  }
  const int pairs = right.rows, columns = sums.bytes / 4;
  float first[kMostRows][kMostBytes / 4], second[kMostRows][kMostBytes / 4];
  for (int k = 0; k < pairs; ++k) {
    for (int n = 0; n < columns; ++n) {
      first[k][n] = widened(right.data[k], 2 * n);
      second[k][n] = widened(right.data[k], 2 * n + 1);
    }
  }
  for (int m = 0; m < sums.rows; ++m) {
    float even[kMostBytes / 4] = {}, odd[kMostBytes / 4] = {};
    for (int k = 0; k < pairs; ++k) {
      const float a = widened(left.data[m], 2 * k), b = widened(left.data[m], 2 * k + 1);
      for (int n = 0; n < columns; ++n) {
        even[n] = std::fma(a, first[k][n], even[n]);
        odd[n] = std::fma(b, second[k][n], odd[n]);
      }
    }
    float row[kMostBytes / 4];
    std::memcpy(row, sums.data[m], sizeof row);
    for (int n = 0; n < columns; ++n) row[n] += even[n] + odd[n];
    std::memcpy(sums.data[m], row, sizeof row);
  }
}

// Registers by the numbers that instructions have for them.
constexpr int kRegisters[] = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP,
                              REG_RSI, REG_RDI, REG_R8,  REG_R9,  REG_R10, REG_R11,
                              REG_R12, REG_R13, REG_R14, REG_R15};

struct Operand {
  int64_t address = 0;  // without a stride
  int64_t stride = 0;
  int length = 0;  // of ModRM and what follows it
};

// What ModRM at `code` names in memory. A tile's access has its stride for an index.
Operand memory_operand(const uint8_t* code, const greg_t* registers, int extra_base,
                       int extra_index, int before) {
  const int mode = code[0] >> 6, low = code[0] & 7;
  Operand found;
  found.length = 1;
  int base = low;
  bool has_base = true, relative = false;
  if (low == 4) {
    const uint8_t sib = code[1];
    found.length = 2;
    base = sib & 7;
    const int index = ((sib >> 3) & 7) | extra_index;
    if (index != 4) found.stride = registers[kRegisters[index]] << (sib >> 6);
    has_base = !(base == 5 && mode == 0);
  } else if (low == 5 && mode == 0) {
    has_base = false;
    relative = true;
  }
  if (has_base) found.address = registers[kRegisters[base | extra_base]];
  if (mode == 1) {
    found.address += static_cast<int8_t>(code[found.length]);
    found.length += 1;
  } else if (mode == 2 || !has_base) {
    int32_t offset = 0;
    std::memcpy(&offset, code + found.length, sizeof offset);
    found.address += offset;
    found.length += 4;
  }
  if (relative) found.address += registers[REG_RIP] + before + found.length;
  return found;
}

// Bytes of the instruction at `code`, done; 0 where it is none of a tile register.
int execute(const uint8_t* code, const greg_t* registers) {
  constexpr int kNone = 0, kF3 = 2, kF2 = 3, kBefore = 4;  // before ModRM: VEX of three, and opcode
  if (code[0] != 0xc4 || (code[1] & 0x1f) != 2 || (code[2] & 0x84) != 0) return 0;
  const int prefix = code[2] & 3, opcode = code[3], modrm = code[4];
  const int mode = modrm >> 6, reg = (modrm >> 3) & 7, low = modrm & 7;
  const int extra_base = code[1] & 0x20 ? 0 : 8, extra_index = code[1] & 0x40 ? 0 : 8;
  if (mode == 3) {
    if (opcode == 0x49 && prefix == kNone && modrm == 0xc0) {
      configured = false;
    } else if (opcode == 0x49 && prefix == kF2 && low == 0) {
      std::memset(tile_of(reg).data, 0, sizeof tiles[reg].data);
    } else if (opcode == 0x5c && prefix == kF3) {
      multiply(tile_of(reg), tile_of(low), tile_of((~code[2] >> 3) & 15));
    } else {
      return 0;
    }
    return kBefore + 1;
  }
  const Operand at = memory_operand(code + kBefore, registers, extra_base, extra_index, kBefore);
  auto* memory = reinterpret_cast<uint8_t*>(at.address);
  if (opcode == 0x49 && prefix == kNone && reg == 0) {
    configure(memory + at.stride);
  } else if (opcode == 0x4b && prefix == kF2 && low == 4) {
    load(tile_of(reg), memory, at.stride);
  } else if (opcode == 0x4b && prefix == kF3 && low == 4) {
    store(tile_of(reg), memory, at.stride);
  } else {
    return 0;
  }
  return kBefore + at.length;
}

void on_illegal(int signal, siginfo_t*, void* context) {
  auto* registers = static_cast<ucontext_t*>(context)->uc_mcontext.gregs;
  const int length = execute(reinterpret_cast<const uint8_t*>(registers[REG_RIP]), registers);
  if (length == 0) {
    ::signal(signal, SIG_DFL);  // and the instruction raises it once more
    return;
  }
  registers[REG_RIP] += length;
}

__attribute__((constructor)) void take_the_signal() {
  struct sigaction action = {};
  action.sa_sigaction = on_illegal;
  action.sa_flags = SA_SIGINFO;
  sigaction(SIGILL, &action, nullptr);
}

}  // namespace

// Its presence has preact's detection suppose that the processor has AMX.
extern "C" __attribute__((visibility("default"))) int preact_tile_registers_are_emulated() {
  return 1;
}
