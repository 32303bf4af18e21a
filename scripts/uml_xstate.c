// SPDX-FileCopyrightText: 2026 The organism.proxmox authors
// SPDX-License-Identifier: GPL-3.0-or-later
/*
 * For a user-mode kernel on a processor with AMX: preloaded into it.
 *
 * Such a host takes a process's extended state (PTRACE_SETREGSET, NT_X86_XSTATE) at its full size only and answers
 * EFAULT to the shorter one that user-mode Linux 6.12 read before; the rest of it is zero. See xstateregs_set() in
 * arch/x86/kernel/fpu/regset.c.
 */
#define _GNU_SOURCE
#include <cpuid.h>
#include <errno.h>
#include <stdarg.h>
#include <string.h>
#include <sys/ptrace.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

#define XSTATE 0x202

long ptrace(enum __ptrace_request request, ...)
{
	static char whole[65536] __attribute__((aligned(64)));
	va_list rest;
	va_start(rest, request);
	long pid = va_arg(rest, long);
	void *address = va_arg(rest, void *);
	void *data = va_arg(rest, void *);
	va_end(rest);

	if (request == PTRACE_PEEKTEXT || request == PTRACE_PEEKDATA || request == PTRACE_PEEKUSER) {
		/* the C library returns the word that the kernel stores */
		long word;
		if (syscall(SYS_ptrace, request, (int)pid, address, &word) < 0)
			return -1;
		errno = 0;
		return word;
	}
	long result = syscall(SYS_ptrace, request, (int)pid, address, data);
	if (result < 0 && errno == EFAULT && request == PTRACE_SETREGSET && (long)address == XSTATE) {
		struct iovec *given = data;
		unsigned enabled, size, all, high;
		__cpuid_count(0xd, 0, enabled, size, all, high);
		if (given->iov_len < all && all <= sizeof whole) {
			struct iovec wide = { whole, all };
			memset(whole, 0, all);
			memcpy(whole, given->iov_base, given->iov_len);
			result = syscall(SYS_ptrace, request, (int)pid, address, &wide);
		}
	}
	return result;
}
