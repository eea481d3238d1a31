// One call of the compiled CPU attention on another processor: inputs from a file, results to a file (test_cpu_native.py).
//
//     native_driver IN OUT
//
// IN: 8 int64 counts and a double (the head of `Arguments`), 1 where numbers are float64, then for each pointer of `Arguments` in its order, up to
// `dslopes`, the number of bytes and the bytes; 0 bytes: a null pointer. OUT: the bytes of `out`, `lse` and the gradients, likewise.
#include <cstdio>
#include <cstdlib>

#include "attention.cpp"

namespace {

void read(void* to, size_t size, FILE* file) {
    if (size && std::fread(to, 1, size, file) != size) std::exit(3);
}

template <class F> int run(Arguments& x) {
    if (forward<F>(x)) return 1;
    std::vector<F> key_gradients(num_gradients<F>(x));
    x.key_gradients = key_gradients.data();
    return backward<F>(x);
}

}  // namespace

int main(int, char** names) {
    FILE* in = std::fopen(names[1], "rb");
    if (!in) return 2;
    Arguments x{};
    int64_t is_float64 = 0;
    read(&x, 8 * sizeof(int64_t) + sizeof(double), in);
    read(&is_float64, sizeof is_float64, in);
    constexpr int POINTERS = 19;
    std::vector<std::vector<char>> memory(POINTERS);
    void** pointers = const_cast<void**>(&x.q);
    for (int i = 0; i < POINTERS; i++) {
        int64_t size = 0;
        read(&size, sizeof size, in);
        memory[i].resize(size);
        read(memory[i].data(), size, in);
        pointers[i] = size ? memory[i].data() : nullptr;
    }
    std::fclose(in);
    const int status = is_float64 ? run<double>(x) : run<float>(x);
    if (status) return status;
    FILE* out = std::fopen(names[2], "wb");
    if (!out) return 2;
    for (const std::vector<char>& bytes : memory) std::fwrite(bytes.data(), 1, bytes.size(), out);
    return std::fclose(out) ? 2 : 0;
}
